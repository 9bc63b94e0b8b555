// How answers are made: the controls beside the conversation, kept in this browser.
import { keys } from "./api.js";
import { h, iconButton } from "./dom.js";
import { load, save } from "./storage.js";

// What the server takes when a field is absent stands as `default`; `empty` fields are left out of the request when they have no value.
const FIELDS = [
  { name: "temperature", min: 0, max: 2, step: 0.05, default: 0.7 },
  { name: "top_p", min: 0.05, max: 1, step: 0.05, default: 0.95 },
  { name: "top_k", min: 0, max: 200, step: 1, default: 0 },
  { name: "min_p", min: 0, max: 1, step: 0.01, default: 0 },
  { name: "max_tokens", min: 1, max: 1_000_000, step: 1, default: null, empty: "sampling.as_fits" },
  { name: "seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, default: null, empty: "sampling.random" },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1, default: 0, more: true },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1, default: 0, more: true },
  { name: "repetition_penalty", min: 0.5, max: 2, step: 0.05, default: 1, more: true },
];
const ALTERNATIVES = 5;

const values = { logprobs: true };
const kept = load("sampling") ?? {};
for (const field of FIELDS) values[field.name] = valid(field, kept[field.name]) ? kept[field.name] : field.default;
if (typeof kept.logprobs === "boolean") values.logprobs = kept.logprobs;

function valid(field, value) {
  if (value === null && field.empty) return true;
  const whole = field.step === 1 ? Number.isInteger(value) : Number.isFinite(value);
  return whole && value >= field.min && value <= field.max;
}

/** The fields of a request. */
export function parameters() {
  const body = {};
  for (const field of FIELDS) if (values[field.name] !== null) body[field.name] = values[field.name];
  if (values.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return body;
}

/** The panel. `system`: reads and writes the system prompt of the conversation; `close`: puts the panel away. */
export function panel({ getSystem, setSystem, close }) {
  const system = h("textarea", { rows: "4", tPlaceholder: "sampling.system_hint", on: { input: () => setSystem(system.value) } });
  const controls = FIELDS.map(control);
  const field = (index) => controls[index].element;
  const key = h("input", {
    type: "password", value: keys.get("chat"), autocomplete: "off", spellcheck: "false", tPlaceholder: "sampling.key_hint",
    on: { change: () => keys.set("chat", key.value.trim()) },
  });
  const logprobs = h("input", { type: "checkbox", checked: values.logprobs, on: { change: () => { values.logprobs = logprobs.checked; save("sampling", values); } } });
  const reset = () => {
    for (const [index, { default: value, name }] of FIELDS.entries()) {
      values[name] = value;
      controls[index].show();
    }
    save("sampling", values);
  };
  const more = h("details", {}, h("summary", { t: "sampling.more" }), FIELDS.map((one, index) => one.more && field(index)));
  const element = h("aside", { class: "sampling", tLabel: "sampling.title" },
    h("header", { class: "panel-head" }, h("h2", { t: "sampling.title" }), iconButton("close", "sampling.close", close)),
    h("div", { class: "panel-body" },
      h("label", { class: "field" }, h("span", { t: "sampling.system" }), system),
      FIELDS.map((one, index) => !one.more && field(index)),
      more,
      h("label", { class: "check" }, logprobs, h("span", { t: "sampling.logprobs" })),
      h("label", { class: "field" }, h("span", { t: "sampling.key" }), key),
      h("p", { class: "muted small", t: "sampling.key_note" }),
      h("button", { type: "button", t: "sampling.reset", on: { click: reset } })));
  return {
    element,
    show() {
      system.value = getSystem();
      key.value = keys.get("chat");
    },
  };
}

function control(field) {
  const { name, min, max, step, empty } = field;
  const id = `sampling-${name}`;
  const input = h("input", { type: "number", id, min, max, step: step === 1 ? 1 : "any", inputmode: step === 1 ? "numeric" : "decimal", tPlaceholder: empty, "aria-describedby": `${id}-note` });
  const slider = empty ? null : h("input", { type: "range", min, max, step, tabindex: "-1", "aria-hidden": "true" });
  const slide = () => {
    if (!slider) return;
    slider.value = values[name];
    slider.style.setProperty("--part", `${((values[name] - min) / (max - min)) * 100}%`);
  };
  const show = () => {
    input.value = values[name] ?? "";
    slide();
    input.removeAttribute("aria-invalid");
  };
  const take = (text) => {
    const value = text === "" && empty ? null : Number(text);
    const good = (text !== "" || empty) && valid(field, value);
    if (good) {
      values[name] = value;
      save("sampling", values);
    }
    return good;
  };
  input.addEventListener("input", () => {
    const good = take(input.value.trim());
    input.toggleAttribute("aria-invalid", !good);
    if (good) slide();
  });
  input.addEventListener("change", show);
  slider?.addEventListener("input", () => {
    take(slider.value);
    show();
  });
  show();
  const element = h("div", { class: "control" },
    h("label", { for: id }, h("span", { t: `sampling.${name}` })), input, slider,
    h("p", { class: "muted small", id: `${id}-note`, t: `sampling.${name}_note` }));
  return { element, show };
}
