// The page's language: a dictionary for each, chosen by the browser's wish until somebody chooses.
import { english } from "./en.js";
import { chinese } from "./zh.js";
import { load, save } from "./storage.js";

const DICTIONARIES = { en: english, zh: chinese };
const listeners = new Set();
let language = load("language");
if (!(language in DICTIONARIES)) {
  const wished = (navigator.languages ?? [navigator.language]).map((tag) => String(tag).slice(0, 2).toLowerCase());
  language = wished.find((tag) => tag in DICTIONARIES) ?? "en";
}

/** The text of a key, with `{name}` replaced by values. */
export function t(key, values = {}) {
  const text = DICTIONARIES[language][key] ?? english[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

export const currentLanguage = () => language;
/** The tag for dates and numbers: the browser's own, with its country, if it is of the language. */
export const locale = () => (navigator.languages ?? []).find((tag) => tag.toLowerCase().startsWith(language)) ?? (language === "zh" ? "zh-CN" : "en");

export function setLanguage(next) {
  language = next in DICTIONARIES ? next : "en";
  save("language", language);
  document.documentElement.lang = locale();
  for (const listener of listeners) listener();
}

export function onLanguage(listener) {
  listeners.add(listener);
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(locale(), { maximumFractionDigits: digits }).format(value);
}

/** With `K`, `M` where it is long. */
export function compact(value) {
  return new Intl.NumberFormat(language === "zh" ? "zh-CN" : "en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
}

export function percent(share, digits = 0) {
  return new Intl.NumberFormat(locale(), { style: "percent", maximumFractionDigits: digits }).format(share);
}

export function money(value, currency) {
  try {
    return new Intl.NumberFormat(locale(), { style: "currency", currency, maximumFractionDigits: value !== 0 && Math.abs(value) < 1 ? 4 : 2 }).format(value);
  } catch {
    // Not everything that is called a currency has a code.
    return `${number(value, 4)} ${currency}`;
  }
}

/** Of Unix seconds. */
export function dateTime(seconds) {
  return new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" }).format(new Date(seconds * 1000));
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return `${number(value, 1)} ms`;
  if (value < 1000) return `${number(value)} ms`;
  return `${number(value / 1000, value < 10_000 ? 2 : 1)} s`;
}
