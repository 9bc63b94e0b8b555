// The page: three views, the theme, the language, the shortcuts.
import { adminView } from "./admin.js";
import { json } from "./api.js";
import { chatView } from "./chat.js";
import { dialog, dismissDialogs } from "./dialog.js";
import { h, icon, iconButton, replace, speakAll } from "./dom.js";
import { currentLanguage, locale, onLanguage, setLanguage, t } from "./i18n.js";
import { liveView } from "./live.js";
import { load, save } from "./storage.js";

const SHORTCUTS = [
  [["Enter"], "help.send"], [["Shift", "Enter"], "help.newline"], [["Esc"], "help.stop"], [["/"], "help.focus"], [["n"], "help.new"], [["s"], "help.settings"],
  [["1"], "nav.chat"], [["2"], "nav.live"], [["3"], "nav.admin"], [["t"], "help.theme"], [["l"], "help.language"], [["?"], "help.title"],
];

document.documentElement.lang = locale();
const views = { chat: chatView(), live: liveView(), admin: adminView() };
let current = null;

// Light, dark, or as the system has it.
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (load("theme") ?? (systemDark.matches ? "dark" : "light")) === "dark";
const themeButton = iconButton("moon", "app.theme", () => setTheme(isDark() ? "light" : "dark"));
const languageButton = h("button", { type: "button", class: "icon-button language", tLabel: "app.language", tTitle: "app.language", on: { click: () => setLanguage(currentLanguage() === "zh" ? "en" : "zh") } });
const model = h("span", { class: "model muted" });
const tab = (name) => h("a", { href: `#${name}`, id: `nav-${name}` }, icon(name), h("span", { t: `nav.${name}` }));
const tabs = Object.keys(views).map(tab);

const header = h("header", { class: "app-head" },
  h("a", { class: "brand", href: "#chat" }, h("img", { src: "/assets/favicon.svg", alt: "", width: "26", height: "26" }), h("b", {}, "ernie"), model),
  h("nav", { class: "app-nav", tLabel: "nav.views" }, tabs),
  h("div", { class: "app-tools" }, languageButton, themeButton, iconButton("help", "help.title", help, { class: "help-button" })));

replace(document.getElementById("app"), header, h("main", { id: "main", tabindex: "-1" }, Object.values(views).map((view) => view.element)));

function setTheme(theme) {
  save("theme", theme === (systemDark.matches ? "dark" : "light") ? null : theme);
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  replace(themeButton, icon(isDark() ? "sun" : "moon"));
  window.dispatchEvent(new Event("ernie-theme"));
}

function showLanguage() {
  languageButton.textContent = currentLanguage() === "zh" ? "EN" : "中";
  languageButton.lang = currentLanguage() === "zh" ? "en" : "zh-CN";
  document.getElementById("skip").textContent = t("app.skip");
  showTitle();
}

/** Its name, as far as we may know it. */
function showModel() {
  json("/v1/models", { use: ["chat", "admin"] }).then(({ data }) => (model.textContent = data?.[0]?.id ?? ""), () => {});
}

function showTitle() {
  document.title = `${t(`nav.${current ?? "chat"}`)} · ernie`;
}

function open(name) {
  if (!(name in views)) name = "chat";
  if (name === current) return;
  // They belong to the view that they were opened in.
  dismissDialogs();
  for (const [other, view] of Object.entries(views)) {
    view.element.hidden = other !== name;
    if (other === current) view.hide();
  }
  tabs.forEach((tab) => (tab.id === `nav-${name}` ? tab.setAttribute("aria-current", "page") : tab.removeAttribute("aria-current")));
  current = name;
  showTitle();
  views[name].show();
}

function help() {
  const row = ([keys, label]) => h("tr", {}, h("td", {}, keys.map((key) => h("kbd", {}, key))), h("td", { t: label }));
  dialog("help.title", () => h("div", { class: "dialog-body" }, h("table", { class: "shortcuts" }, h("tbody", {}, SHORTCUTS.map(row))), h("p", { class: "muted small", t: "help.note" })));
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.key === "Escape") {
    if (views[current].escape()) event.preventDefault();
    else if (event.target.matches?.("textarea, input")) event.target.blur();
    return;
  }
  // Letters are for whoever writes.
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("textarea, input, select, [contenteditable]")) return;
  const act = {
    1: () => (location.hash = "chat"), 2: () => (location.hash = "live"), 3: () => (location.hash = "admin"),
    "?": help, t: () => setTheme(isDark() ? "light" : "dark"), l: () => setLanguage(currentLanguage() === "zh" ? "en" : "zh"),
    "/": () => inChat(() => views.chat.focus()), n: () => inChat(() => views.chat.create()), s: () => inChat(() => views.chat.toggleSettings()),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

function inChat(act) {
  location.hash = "chat";
  open("chat");
  act();
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
onLanguage(() => {
  speakAll();
  showLanguage();
});
systemDark.addEventListener("change", showTheme);
window.addEventListener("ernie-key", showModel);
window.addEventListener("hashchange", () => open(location.hash.slice(1)));
showTheme();
showLanguage();
open(location.hash.slice(1) || "chat");
showModel();
