// Usage by day, key and model: tokens and money.
import { admin } from "./admin.js";
import { barChart } from "./charts.js";
import { h, icon, replace } from "./dom.js";
import { compact, locale, money, number, t } from "./i18n.js";

const RANGES = [7, 30, 90];
const choice = { days: 30, measure: "tokens" };

const day = (ago) => new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);
const tokensOf = (row) => (row.prompt_tokens ?? 0) + (row.completion_tokens ?? 0);

export async function usagePart({ session }) {
  const content = h("div", { class: "usage" });
  const option = (name, value, label) => {
    const input = h("input", { type: "radio", name: `usage-${name}`, value, checked: choice[name] === value });
    input.addEventListener("change", () => {
      choice[name] = value;
      show().catch((error) => replace(content, h("div", { class: "trouble", role: "alert" }, icon("warning"), h("p", {}, error.message))));
    });
    return h("label", {}, input, h("span", {}, label));
  };
  const head = h("div", { class: "part-head" },
    h("fieldset", { class: "segments" }, h("legend", { class: "off-screen", t: "usage.range" }), RANGES.map((days) => option("days", days, t("usage.days", { days })))),
    h("fieldset", { class: "segments" }, h("legend", { class: "off-screen", t: "usage.measure" }), ["tokens", "money", "requests"].map((measure) => option("measure", measure, t(`usage.${measure}`)))));
  await show();
  return [head, content];

  async function show() {
    const range = `from=${day(choice.days - 1)}&to=${day(0)}`;
    const [days, keys, models] = await Promise.all(["day", "key", "model"].map(async (by) => (await admin(`usage?${range}&by=${by}`)).data));
    const value = { tokens: tokensOf, money: (row) => row.money ?? 0, requests: (row) => row.requests ?? 0 }[choice.measure];
    const text = (row) => (choice.measure === "money" ? money(value(row), session.currency) : number(value(row)));
    const sum = (of) => days.reduce((all, row) => all + (of(row) ?? 0), 0);
    const tile = (label, value, detail) => h("div", { class: "tile" }, h("span", { class: "muted", t: label }), h("strong", {}, value), h("span", { class: "muted small" }, detail));
    const joules = sum((row) => row.joules);
    const tiles = h("div", { class: "tiles" },
      tile("usage.requests", compact(sum((row) => row.requests)), t("usage.in_days", { days: choice.days })),
      tile("usage.tokens", compact(sum(tokensOf)), t("usage.in_out", { prompt: compact(sum((row) => row.prompt_tokens)), answer: compact(sum((row) => row.completion_tokens)) })),
      tile("usage.money", money(sum((row) => row.money), session.currency), t("usage.seconds", { seconds: compact(sum((row) => row.seconds)) })),
      joules > 0 && tile("usage.energy", energy(joules), t(`usage.${session.energy === "measured" ? "measured" : "modelled"}`)));
    const byDay = new Map(days.map((row) => [row.day, row]));
    const bars = Array.from({ length: choice.days }, (_, index) => {
      const date = day(choice.days - 1 - index);
      const row = byDay.get(date) ?? {};
      return { label: new Intl.DateTimeFormat(locale(), { month: "short", day: "numeric", timeZone: "UTC" }).format(new Date(date)), value: value(row), text: text(row) };
    });
    replace(content, tiles, h("section", { class: "card" }, h("h2", { t: "usage.by_day" }), barChart(bars, t("usage.by_day"), choice.measure === "money" ? (value) => money(value, session.currency) : compact)),
      h("div", { class: "cards two" }, ranking("usage.by_key", keys, (row) => row.key_name ?? row.key_id ?? t("usage.no_key")), ranking("usage.by_model", models, (row) => row.model ?? "–")));

    function ranking(title, rows, name) {
      const order = [...rows].sort((a, b) => value(b) - value(a)).slice(0, 20);
      const most = Math.max(...order.map(value), 0) || 1;
      const line = (row) => {
        const fill = h("i");
        fill.style.width = `${(value(row) / most) * 100}%`;
        return h("li", {}, h("div", { class: "budget-text" }, h("span", { dir: "auto" }, name(row)), h("span", {}, text(row))), h("div", { class: "budget-track" }, fill));
      };
      return h("section", { class: "card" }, h("h2", { t: title }), order.length > 0 ? h("ul", { class: "ranking" }, order.map(line)) : h("p", { class: "muted", t: "usage.none" }));
    }
  }
}

/** Joules as people are billed for them. */
function energy(joules) {
  const hours = joules / 3600;
  return hours < 1000 ? `${number(hours, hours < 10 ? 2 : 0)} Wh` : `${number(hours / 1000, 2)} kWh`;
}
