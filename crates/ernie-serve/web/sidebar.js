// The list of conversations: open, rename, delete, export, import.
import { ask, confirm, notice } from "./dialog.js";
import { h, icon, iconButton, replace } from "./dom.js";
import { t } from "./i18n.js";
import * as store from "./store.js";

/** Largest file that is read. */
const LARGEST = 32 << 20;

export function sidebar({ open, create, isOpen, renamed, removed }) {
  const entries = h("ul", { class: "entries" });
  const file = h("input", { type: "file", accept: ".json,application/json", hidden: true, on: { change: take } });
  const newButton = h("button", { type: "button", class: "new primary", on: { click: () => { close(); create(); } } }, icon("plus"), h("span", { t: "chat.new" }));
  const foot = h("div", { class: "sidebar-foot" },
    h("button", { type: "button", class: "quiet", on: { click: () => file.click() } }, icon("upload"), h("span", { t: "chat.import" })),
    h("button", { type: "button", class: "quiet", on: { click: () => saveFile("conversations.json", store.exported(store.list()), "application/json") } }, icon("download"), h("span", { t: "chat.export_all" })), file);
  const shade = h("div", { class: "shade", on: { click: close } });
  const element = h("nav", { class: "sidebar", tLabel: "chat.conversations" }, shade, h("div", { class: "sidebar-inner" }, newButton, entries, foot));

  function show() {
    const all = store.list();
    // Whoever is moving through the list with the keyboard stays where they are.
    const focused = entries.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    replace(entries, all.length > 0 ? all.map(entry) : h("li", { class: "muted small none", t: "chat.none" }));
    if (focused) entries.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  function entry(conversation) {
    const name = store.titleOf(conversation);
    const current = isOpen(conversation.id);
    const button = h("button", { type: "button", class: "entry", title: name, "data-id": conversation.id, "aria-current": current ? "true" : null, dir: "auto", on: { click: () => { close(); open(conversation.id); } } }, name);
    const more = iconButton("more", "chat.more", () => (menu.hidden ? openMenu() : closeMenu()), { "aria-expanded": "false", "aria-haspopup": "true" });
    const action = (picture, label, act) => h("button", { type: "button", on: { click: () => { closeMenu(); act(); } } }, icon(picture), h("span", { t: label }));
    const menu = h("div", { class: "menu", hidden: true },
      action("edit", "chat.rename", () => rename(conversation)),
      action("download", "chat.export_json", () => saveFile(`${fileName(name)}.json`, store.exported([conversation]), "application/json")),
      action("download", "chat.export_markdown", () => saveFile(`${fileName(name)}.md`, store.asMarkdown(conversation), "text/markdown")),
      action("trash", "chat.delete", () => drop(conversation)));
    const outside = (event) => !item.contains(event.target) && closeMenu();
    function openMenu() {
      menu.hidden = false;
      more.setAttribute("aria-expanded", "true");
      menu.querySelector("button").focus();
      document.addEventListener("pointerdown", outside);
    }
    function closeMenu() {
      menu.hidden = true;
      more.setAttribute("aria-expanded", "false");
      document.removeEventListener("pointerdown", outside);
    }
    const item = h("li", { class: current ? "current" : "" }, button, more, menu);
    item.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !menu.hidden) {
        event.stopPropagation();
        closeMenu();
        more.focus();
      }
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step && menu.contains(document.activeElement)) {
        event.preventDefault();
        const all = [...menu.querySelectorAll("button")];
        all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
      }
    });
    return item;
  }

  async function rename(conversation) {
    const title = await ask("chat.rename", "chat.title", store.titleOf(conversation));
    if (title === null) return;
    const fresh = store.find(conversation.id);
    if (!fresh) return;
    fresh.title = title.trim();
    store.keep(fresh, false);
    renamed(conversation.id, fresh.title);
    show();
  }

  async function drop(conversation) {
    if (!(await confirm("chat.delete", t("chat.delete_sure", { title: store.titleOf(conversation) }), "chat.delete"))) return;
    store.remove(conversation.id);
    removed(conversation.id);
    show();
  }

  async function take() {
    const chosen = file.files[0];
    file.value = "";
    if (!chosen) return;
    try {
      if (chosen.size > LARGEST) throw new Error("size");
      const count = store.importFrom(await chosen.text());
      notice(t("chat.imported", { count }));
    } catch (error) {
      notice(t(error.message === "full" ? "chat.not_kept" : "chat.import_failed"), "warning");
    }
    show();
  }

  function toggle() {
    element.classList.toggle("shown");
    if (element.classList.contains("shown")) newButton.focus();
  }

  /** Whether it was open over the conversation, as it is on small screens. */
  function close() {
    const was = element.classList.contains("shown");
    element.classList.remove("shown");
    return was;
  }

  return { element, show, toggle, close };
}

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";

function saveFile(name, content, kind) {
  const address = URL.createObjectURL(new Blob([content], { type: kind }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
