// Keys: who may do what, how much, and how much it has been this month.
import { admin } from "./admin.js";
import { confirm, dialog, notice } from "./dialog.js";
import { h, icon, replace } from "./dom.js";
import { compact, dateTime, money, number, percent, t } from "./i18n.js";
import { copyText } from "./markdown.js";

const SCOPES = ["chat", "completions", "embeddings", "tokenize", "models", "metrics", "admin"];
const USUAL = ["chat", "completions", "embeddings", "tokenize", "models"];
const LIMITS = [
  { name: "requests_per_minute", step: "1" }, { name: "tokens_per_minute", step: "1" }, { name: "tokens_per_month", step: "1" }, { name: "money_per_month", step: "any" },
];

export async function keysPart({ session, reload }) {
  const { data } = await admin("keys");
  // Those that work first.
  const order = [...data].sort((a, b) => Number(isOver(a)) - Number(isOver(b)) || b.created - a.created);
  const create = h("button", { type: "button", class: "primary", on: { click: createKey } }, icon("plus"), h("span", { t: "admin.new_key" }));
  const head = h("div", { class: "part-head" }, h("p", { class: "muted" }, t("admin.keys_count", { count: number(data.filter((key) => !isOver(key)).length) })), create);
  if (data.length === 0) return [head, h("p", { class: "muted empty", t: "admin.no_keys" })];
  return [head, h("div", { class: "key-cards" }, order.map(card))];

  function card(key) {
    const used = key.month ?? {};
    const tokens = (used.prompt_tokens ?? 0) + (used.completion_tokens ?? 0);
    const state = key.revoked ? "admin.revoked" : isOver(key) ? "admin.expired" : null;
    const budgets = [
      key.tokens_per_month && budget("admin.tokens_per_month", tokens, key.tokens_per_month, compact),
      key.money_per_month && budget("admin.money_per_month", used.money ?? 0, key.money_per_month, (value) => money(value, session.currency)),
    ].filter(Boolean);
    const fact = (label, value) => h("div", {}, h("dt", { t: label }), h("dd", {}, value));
    const rate = [key.requests_per_minute && t("admin.per_minute_requests", { count: compact(key.requests_per_minute) }), key.tokens_per_minute && t("admin.per_minute_tokens", { count: compact(key.tokens_per_minute) })].filter(Boolean);
    return h("article", { class: `card key ${state ? "over" : ""}` },
      h("header", {}, h("h2", { dir: "auto" }, key.name), state && h("span", { class: "badge", t: state }), h("code", { class: "muted" }, key.id)),
      h("div", { class: "chips" }, key.scopes.map((scope) => h("span", { class: "chip" }, scope)), (key.models ?? []).map((model) => h("span", { class: "chip model" }, model))),
      h("dl", { class: "facts-list" }, fact("admin.this_month", t("admin.month_use", { requests: compact(used.requests ?? 0), tokens: compact(tokens) })), fact("admin.cost", money(used.money ?? 0, session.currency)),
        fact("admin.rate", rate.length > 0 ? rate.join(" · ") : t("admin.unlimited")), fact("admin.last_used", key.last_used ? dateTime(key.last_used) : t("admin.never")), fact("admin.created", dateTime(key.created)),
        key.expires && fact("admin.expires", dateTime(key.expires))),
      budgets,
      !key.revoked && h("footer", {}, h("button", { type: "button", t: "admin.edit", on: { click: () => editKey(key) } }), h("button", { type: "button", class: "quiet danger-text", t: "admin.revoke", on: { click: () => revoke(key) } })));
  }

  async function createKey() {
    const created = await dialog("admin.new_key", (close) => keyForm(null, async (fields) => close(await admin("keys", { method: "POST", body: fields }))), { wide: true });
    if (!created) return;
    await showSecret(created);
    reload();
  }

  async function editKey(key) {
    const changed = await dialog("admin.edit", (close) => keyForm(key, async (fields) => close(await admin(`keys/${encodeURIComponent(key.id)}`, { method: "PATCH", body: fields }))), { wide: true });
    if (changed) reload();
  }

  async function revoke(key) {
    if (!(await confirm("admin.revoke", t("admin.revoke_sure", { name: key.name }), "admin.revoke"))) return;
    try {
      await admin(`keys/${encodeURIComponent(key.id)}/revoke`, { method: "POST", body: {} });
    } catch (error) {
      notice(error.message, "warning");
    }
    reload();
  }
}

const isOver = (key) => Boolean(key.revoked) || (key.expires !== null && key.expires !== undefined && key.expires * 1000 <= Date.now());

/** How much of a budget is spent. */
function budget(label, used, limit, format) {
  const part = limit > 0 ? used / limit : 1;
  const kind = part >= 1 ? "full" : part >= 0.8 ? "near" : "";
  const fill = h("i");
  fill.style.width = `${Math.min(100, part * 100)}%`;
  return h("div", { class: `budget ${kind}` }, h("div", { class: "budget-text" }, h("span", { t: label }), h("span", {}, t("admin.of", { used: format(used), limit: format(limit) }), ` · ${percent(part)}`)),
    h("div", { class: "budget-track", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": String(Math.round(Math.min(100, part * 100))), tLabel: label }, fill));
}

/** The form of a new key, or of one that there is. `send` gets the fields; what it throws is shown. */
function keyForm(key, send) {
  const name = h("input", { type: "text", required: true, maxlength: "100", value: key?.name ?? "", "data-first": true, autocomplete: "off" });
  const scopes = SCOPES.map((scope) => h("input", { type: "checkbox", value: scope, checked: (key?.scopes ?? USUAL).includes(scope) }));
  const models = h("input", { type: "text", value: (key?.models ?? []).join(", "), tPlaceholder: "admin.all_models", autocomplete: "off", spellcheck: "false" });
  const expires = h("input", { type: "date", value: key?.expires ? new Date(key.expires * 1000).toISOString().slice(0, 10) : "" });
  const limits = LIMITS.map(({ name, step }) => h("input", { type: "number", min: "0", step, value: key?.[name] ?? "", tPlaceholder: "admin.unlimited" }));
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const button = h("button", { type: "submit", class: "primary", t: key ? "dialog.save" : "admin.create" });
  const values = () => {
    const list = models.value.split(",").map((model) => model.trim()).filter(Boolean);
    const fields = {
      name: name.value.trim(),
      scopes: scopes.filter((box) => box.checked).map((box) => box.value),
      models: list.length > 0 ? list : null,
      expires: expires.value ? Math.floor(Date.parse(`${expires.value}T00:00:00Z`) / 1000) : null,
    };
    LIMITS.forEach(({ name }, index) => (fields[name] = limits[index].value === "" ? null : Number(limits[index].value)));
    return fields;
  };
  const shown = values();
  const submit = async (event) => {
    event.preventDefault();
    const fields = values();
    if (key) {
      // Only what was changed here: others may have changed the rest, and a day is not all there is to an expiry.
      for (const field of Object.keys(fields)) if (JSON.stringify(fields[field]) === JSON.stringify(shown[field])) delete fields[field];
    }
    button.disabled = true;
    try {
      await send(fields);
    } catch (error) {
      trouble.hidden = false;
      trouble.textContent = error.message;
      button.disabled = false;
    }
  };
  const field = (label, input) => h("label", { class: "field" }, h("span", { t: label }), input);
  return h("form", { class: "dialog-body", on: { submit } }, field("admin.name", name),
    h("fieldset", {}, h("legend", { t: "admin.scopes" }), h("div", { class: "scope-grid" }, scopes.map((box) => h("label", { class: "check" }, box, h("span", {}, box.value))))),
    h("div", { class: "form-grid" }, field("admin.models", models), field("admin.expires", expires), LIMITS.map(({ name }, index) => field(`admin.${name}`, limits[index]))), trouble,
    h("div", { class: "dialog-actions" }, button));
}

/** The secret, once. */
function showSecret(created) {
  return dialog("admin.secret", (close) => {
    const field = h("input", { type: "text", readonly: true, value: created.key, class: "secret", tLabel: "admin.secret", "data-first": true, on: { focus: () => field.select() } });
    const copy = h("button", { type: "button", class: "primary" }, icon("copy"), h("span", { t: "code.copy" }));
    copy.addEventListener("click", async () => {
      field.focus();
      if (await copyText(created.key)) replace(copy, icon("check"), h("span", { t: "code.copied" }));
    });
    return h("div", { class: "dialog-body" }, h("p", {}, t("admin.secret_note", { name: created.name })), h("div", { class: "secret-row" }, field, copy),
      h("div", { class: "dialog-actions" }, h("button", { type: "button", t: "admin.secret_done", on: { click: () => close() } })));
  });
}
