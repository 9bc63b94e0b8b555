// Administration: sign in, then keys, usage, the audit log and settings. The key stays in this tab and is gone when it is closed.
import { json, keys, RequestError } from "./api.js";
import { keysPart } from "./admin-keys.js";
import { usagePart } from "./admin-usage.js";
import { notice } from "./dialog.js";
import { h, icon, replace } from "./dom.js";
import { dateTime, onLanguage, t } from "./i18n.js";

const PARTS = { keys: keysPart, usage: usagePart, audit: auditPart, settings: settingsPart };
const AUDIT_PAGE = 50;

/** A request to the admin API. */
export const admin = (path, options = {}) => json(`/admin/api/${path}`, { use: ["admin"], ...options });

export function adminView() {
  let session = null;
  let part = "keys";
  let visible = false;
  const who = h("span", { class: "muted small" });
  const leave = h("button", { type: "button", class: "quiet", t: "admin.sign_out", hidden: true, on: { click: signOut } });
  const tabs = Object.keys(PARTS).map((name) =>
    h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "admin-part", t: `admin.${name}`, on: { click: () => open(name) } }));
  const bar = h("div", { class: "tabs", role: "tablist", tLabel: "admin.title", hidden: true }, tabs);
  const content = h("div", { class: "panel-scroll", id: "admin-part" });
  const element = h("section", { class: "panel", id: "view-admin", tLabel: "nav.admin" },
    h("header", { class: "view-head" }, h("h1", { t: "admin.title" }), who, leave), bar, content);

  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
  onLanguage(() => visible && session && (showWho(), open(part)));

  async function start() {
    replace(content, h("p", { class: "muted", t: "admin.loading" }));
    try {
      session = await admin("session");
      const allowed = session.open || session.key?.scopes?.includes("admin");
      if (!allowed) throw new RequestError(403, t("admin.no_scope"));
      showWho();
      open(part);
    } catch (error) {
      session = null;
      bar.hidden = true;
      leave.hidden = true;
      who.textContent = "";
      showSignIn(error);
    }
  }

  function showWho() {
    who.textContent = session.open ? t("admin.open") : t("admin.signed_in", { name: session.key.name });
    leave.hidden = session.open;
    bar.hidden = false;
  }

  function showSignIn(error) {
    // Nobody has tried yet: not a fault.
    const fresh = error.status === 401 && !keys.get("admin");
    const input = h("input", { type: "password", id: "admin-key", autocomplete: "off", spellcheck: "false", required: true });
    const message = error.status === 401 ? t("error.key") : error.message;
    const trouble = fresh ? null : h("p", { class: "trouble", role: "alert" }, icon("warning"), h("span", {}, message));
    const submit = (event) => {
      event.preventDefault();
      keys.set("admin", input.value.trim());
      start();
    };
    replace(content, h("form", { class: "sign-in card", on: { submit } }, h("h2", {}, icon("key"), h("span", { t: "admin.sign_in" })),
      h("p", { class: "muted", t: "admin.sign_in_note" }), h("label", { class: "field", for: "admin-key" }, h("span", { t: "key.label" }), input), trouble,
      h("div", { class: "dialog-actions" }, h("button", { type: "submit", class: "primary", t: "admin.sign_in" }))));
    if (visible) input.focus();
  }

  function signOut() {
    keys.set("admin", "");
    session = null;
    start();
  }

  async function open(name) {
    part = name;
    tabs.forEach((tab) => {
      const selected = tab.id === `tab-${name}`;
      tab.setAttribute("aria-selected", String(selected));
      tab.tabIndex = selected ? 0 : -1;
    });
    content.setAttribute("role", "tabpanel");
    content.setAttribute("aria-labelledby", `tab-${name}`);
    replace(content, h("p", { class: "muted", t: "admin.loading" }));
    const reload = () => open(name);
    try {
      const shown = await PARTS[name]({ session, reload });
      if (part === name && session) replace(content, shown);
    } catch (error) {
      if (part !== name) return;
      if (error.status === 401) return showExpired(error);
      replace(content, h("div", { class: "trouble", role: "alert" }, icon("warning"), h("p", {}, error.message), h("button", { type: "button", t: "chat.retry", on: { click: reload } })));
    }
  }

  function showExpired(error) {
    session = null;
    bar.hidden = true;
    leave.hidden = true;
    who.textContent = "";
    showSignIn(error);
  }

  return {
    element,
    show() {
      visible = true;
      if (!session) start();
    },
    hide() {
      visible = false;
    },
    escape: () => false,
  };
}

async function auditPart() {
  const body = h("tbody");
  const more = h("button", { type: "button", t: "admin.more", hidden: true });
  const row = (entry) => h("tr", {}, h("td", { class: "nowrap" }, dateTime(entry.at)), h("td", {}, entry.actor ?? "–"), h("td", {}, h("code", {}, entry.action)), h("td", {}, entry.target ?? "–"),
    h("td", { class: "detail" }, typeof entry.detail === "string" ? entry.detail : entry.detail ? JSON.stringify(entry.detail) : ""));
  const page = async (before) => {
    const { data } = await admin(`audit?limit=${AUDIT_PAGE}${before === undefined ? "" : `&before=${encodeURIComponent(before)}`}`);
    body.append(...data.map(row));
    more.hidden = data.length < AUDIT_PAGE;
    more.onclick = () => page(data.at(-1).id).catch((error) => notice(error.message, "warning"));
    return data.length;
  };
  const count = await page();
  if (count === 0) return h("p", { class: "muted empty", t: "admin.no_audit" });
  const heads = ["admin.time", "admin.actor", "admin.action", "admin.target", "admin.detail"].map((key) => h("th", { t: key, scope: "col" }));
  return [h("div", { class: "table-frame card", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)), more];
}

async function settingsPart() {
  let settings = await admin("settings");
  const dynamic = h("input", { type: "checkbox", role: "switch", checked: settings.dynamic_batching });
  const size = h("input", { type: "number", min: "1", max: "4294967295", step: "1", value: settings.max_batch_size, required: true, inputmode: "numeric" });
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const submit = async (event) => {
    event.preventDefault();
    const body = {};
    if (dynamic.checked !== settings.dynamic_batching) body.dynamic_batching = dynamic.checked;
    if (Number(size.value) !== settings.max_batch_size) body.max_batch_size = Number(size.value);
    try {
      settings = await admin("settings", { method: "PATCH", body });
      trouble.hidden = true;
      notice(t("admin.settings_saved"));
    } catch (error) {
      trouble.hidden = false;
      trouble.textContent = error.message;
    }
  };
  return h("form", { class: "card settings", on: { submit } }, h("h2", { t: "admin.settings" }),
    h("label", { class: "switch" }, dynamic, h("span", {}, h("b", { t: "admin.dynamic" }), h("span", { class: "muted small", t: "admin.dynamic_note" }))),
    h("label", { class: "field" }, h("span", { t: "admin.batch" }), size), h("p", { class: "muted small", t: "admin.batch_note" }), trouble,
    h("div", { class: "dialog-actions" }, h("button", { type: "submit", class: "primary", t: "admin.apply" })));
}
