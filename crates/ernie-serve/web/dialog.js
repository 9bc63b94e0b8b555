// Dialogs and short notices.
import { h, iconButton } from "./dom.js";

/** A dialog with a title; `build(close)` gives its contents. Resolves with what `close` was called with, or null if it was dismissed. */
export function dialog(title, build, { wide = false } = {}) {
  return new Promise((resolve) => {
    let result = null;
    const close = (value = null) => {
      result = value;
      element.close();
    };
    const heading = h("h2", { id: "dialog-title", t: title });
    const head = h("header", {}, heading, iconButton("close", "dialog.close", () => close()));
    const element = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": "dialog-title" }, head, build(close));
    element.addEventListener("close", () => {
      element.remove();
      resolve(result);
    });
    element.addEventListener("click", (event) => {
      if (event.target === element) close();
    });
    document.body.append(element);
    element.showModal();
    element.querySelector("[data-first]")?.focus();
  });
}

/** Whether it was confirmed. */
export async function confirm(title, text, action) {
  const answer = await dialog(title, (close) => {
    const yes = h("button", { type: "button", class: "danger", t: action, on: { click: () => close(true) } });
    const no = h("button", { type: "button", t: "dialog.cancel", "data-first": true, on: { click: () => close() } });
    return h("div", { class: "dialog-body" }, h("p", {}, text), h("div", { class: "dialog-actions" }, no, yes));
  });
  return answer === true;
}

/** A line of text, or null. */
export function ask(title, label, value, { action = "dialog.save", type = "text", note = null } = {}) {
  return dialog(title, (close) => {
    const input = h("input", { type, value, maxlength: "500", "data-first": true, autocomplete: "off", spellcheck: "false" });
    const form = h(
      "form",
      { class: "dialog-body", on: { submit: (event) => { event.preventDefault(); close(input.value); } } },
      h("label", { class: "field" }, h("span", { t: label }), input),
      note && h("p", { class: "muted", t: note }),
      h("div", { class: "dialog-actions" }, h("button", { type: "button", t: "dialog.cancel", on: { click: () => close() } }), h("button", { type: "submit", class: "primary", t: action })),
    );
    return form;
  });
}

/** Ends all dialogs, as if they were dismissed. */
export function dismissDialogs() {
  for (const element of document.querySelectorAll("dialog[open]")) element.close();
}

let shown = null;

/** A notice at the edge, read out, gone after some seconds or with a click. */
export function notice(text, kind = "info") {
  shown?.remove();
  const element = h("div", { class: `notice ${kind}`, on: { click: () => element.remove() } }, text);
  document.getElementById("notices").append(element);
  shown = element;
  setTimeout(() => element.remove(), 5000);
}
