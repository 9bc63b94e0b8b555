// One turn of a conversation on the screen.
import { h, icon, iconButton, replace } from "./dom.js";
import { number, percent, t } from "./i18n.js";
import { copyText, render } from "./markdown.js";

/** Tokens of an answer with their probabilities, as long as the page is open: they would soon fill what a browser keeps. */
const reports = new WeakMap();

export const reportOf = (message) => reports.get(message);

/** Adds what the server reported of some tokens. */
export function report(message, content) {
  if (!Array.isArray(content)) return;
  const tokens = reports.get(message) ?? [];
  const one = ({ token, bytes, logprob }) => ({ bytes, text: String(token ?? ""), p: Math.exp(Number(logprob)) });
  for (const token of content) tokens.push({ ...one(token), top: (token.top_logprobs ?? []).map(one) });
  reports.set(message, tokens);
}

/**
 * A view of a message. `actions`: `{edit, regenerate, retry}`, each may be missing. Call `update()` when the message has changed, and `finish()` when it
 * is complete.
 */
export function messageView(message, actions) {
  const body = h("div", { class: "message-body", dir: "auto" });
  const foot = h("footer");
  const trouble = h("div");
  const role = h("h3", { class: "off-screen", t: `role.${message.role}` });
  const element = h("article", { class: `message ${message.role}` }, role, body, trouble, foot);
  let showsTokens = false;
  let writing = false;

  function update() {
    if (message.role === "user") replace(body, message.content);
    else if (showsTokens) replace(body, tokenView(reports.get(message) ?? []));
    else if (message.content === "" && writing) replace(body, h("span", { class: "waiting", tLabel: "chat.waiting" }, h("i"), h("i"), h("i")));
    else {
      if (!body.blocks) body.replaceChildren();
      render(body, message.content);
    }
    if (showsTokens || message.content === "") body.blocks = undefined;
  }

  function finish() {
    replace(trouble, message.error && h("div", { class: "trouble", role: "alert" }, icon("warning"), h("p", {}, message.error),
      actions.retry && h("button", { type: "button", class: "primary", t: "chat.retry", on: { click: actions.retry } })));
    const tokens = reports.get(message);
    const buttons = [
      message.content && iconButton("copy", "message.copy", (event) => copy(event.currentTarget)),
      actions.edit && iconButton("edit", "message.edit", edit),
      actions.regenerate && iconButton("again", "message.regenerate", actions.regenerate),
      tokens?.length > 0 && iconButton("bars", "message.tokens", toggle, { "aria-pressed": String(showsTokens) }),
    ];
    replace(foot, h("div", { class: "message-actions" }, buttons), facts());
  }

  function facts() {
    const parts = [];
    if (message.finish === "stopped") parts.push(t("message.stopped"));
    if (message.finish === "length") parts.push(t("message.length"));
    if (message.tokens > 0) parts.push(t("message.tokens_count", { count: number(message.tokens) }));
    if (message.tokens > 1 && message.seconds > message.first) {
      parts.push(t("message.speed", { speed: number((message.tokens - 1) / (message.seconds - message.first), 1) }));
    }
    if (message.first > 0) parts.push(t("message.first", { seconds: number(message.first, 2) }));
    return parts.length > 0 && h("span", { class: "facts" }, parts.join(" · "));
  }

  async function copy(button) {
    if (await copyText(message.content)) {
      replace(button, icon("check"));
      setTimeout(() => replace(button, icon("copy")), 1500);
    }
  }

  function toggle(event) {
    showsTokens = !showsTokens;
    event.currentTarget.setAttribute("aria-pressed", String(showsTokens));
    body.blocks = undefined;
    body.replaceChildren();
    update();
  }

  function edit() {
    const area = h("textarea", { value: message.content, rows: "3", tLabel: "message.edit" });
    const leave = () => {
      element.classList.remove("editing");
      update();
      finish();
      foot.querySelector("button")?.focus();
    };
    const send = () => area.value.trim() && actions.edit(area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    element.classList.add("editing");
    replace(body, area);
    replace(foot, h("div", { class: "edit-actions" },
      h("button", { type: "button", t: "dialog.cancel", on: { click: leave } }),
      h("button", { type: "button", class: "primary", t: "message.send", on: { click: send } })));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  update();
  finish();
  return {
    element, update, finish,
    set writing(value) {
      writing = value;
      element.classList.toggle("writing", value);
      element.setAttribute("aria-busy", String(value));
    },
  };
}

/** Every token with its probability as the depth of its colour; pointing at one, or moving to it with the arrows, shows what else could have stood there. */
function tokenView(tokens) {
  const decoder = new TextDecoder();
  const spans = tokens.map((token, index) => {
    // A character may be spread over tokens: it is shown with the last one.
    const text = Array.isArray(token.bytes) ? decoder.decode(Uint8Array.from(token.bytes), { stream: true }) : token.text;
    const doubt = Math.min(4, Math.floor((1 - Math.min(1, token.p)) * 5));
    return h("span", { class: `token doubt-${doubt}`, tabindex: index === 0 ? "0" : "-1", "data-index": String(index), "aria-label": `${token.text} ${percent(token.p, 1)}` }, text || "·");
  });
  const card = h("div", { class: "token-card", hidden: true });
  const text = h("div", { class: "tokens", role: "group", tLabel: "message.tokens" }, spans);
  const frame = h("div", { class: "token-frame" }, text, card);
  const show = (event) => {
    const span = event.target.closest?.(".token");
    if (!span) return hide();
    const token = tokens[Number(span.dataset.index)];
    const row = (one) => {
      const bar = h("meter", { min: "0", max: "1", value: one.p, "aria-hidden": "true" });
      const chosen = sameToken(one, token) ? "chosen" : "";
      return h("tr", { class: chosen }, h("td", {}, h("code", {}, visible(one.text))), h("td", {}, bar), h("td", {}, percent(one.p, 1)));
    };
    const rows = token.top.some((one) => sameToken(one, token)) ? token.top : [...token.top, token];
    card.hidden = false;
    replace(card, h("table", {}, h("tbody", {}, rows.map(row))));
    const [place, room] = [span.getBoundingClientRect(), frame.getBoundingClientRect()];
    const left = Math.max(0, Math.min(place.left - room.left, room.width - card.offsetWidth));
    card.style.left = `${left}px`;
    card.style.top = `${place.bottom - room.top + 4}px`;
  };
  const hide = () => {
    card.hidden = true;
  };
  text.addEventListener("pointerover", show);
  text.addEventListener("pointerleave", hide);
  text.addEventListener("focusin", show);
  text.addEventListener("focusout", hide);
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && spans[Number(event.target.dataset.index) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return frame;
}

const sameToken = (a, b) => a.text === b.text && String(a.bytes) === String(b.bytes);
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";
