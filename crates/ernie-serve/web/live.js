// How the server is doing: numbers, curves of the last minutes, and maps of experts and heads, from one event a second.
import { events, keys, request } from "./api.js";
import { heatMap, lineChart } from "./charts.js";
import { ask } from "./dialog.js";
import { h, replace } from "./dom.js";
import { compact, milliseconds, number, onLanguage, percent, t } from "./i18n.js";

/** Seconds that are shown. */
const SECONDS = 300;
/** Milliseconds until the next attempt after each failed one. */
const WAITS = [1000, 2000, 4000, 8000, 15_000];
/** Milliseconds without an event after which a connection counts as lost: there is one a second. */
const SILENCE = 10_000;

export function liveView() {
  const points = [];
  let abort = null;
  let latest = null;
  const status = h("span", { class: "status", role: "status" });
  const signIn = h("button", { type: "button", class: "primary", t: "key.enter", hidden: true, on: { click: enterKey } });
  const tiles = h("div", { class: "tiles" });
  const rate = (value) => number(value, value < 10 ? 1 : 0);
  const latency = (title, field) => lineChart(title, {
    series: [{ label: "live.p50", class: "first", value: (point) => point[field]?.p50 }, { label: "live.p99", class: "second", value: (point) => point[field]?.p99 }],
    format: milliseconds, seconds: SECONDS,
  });
  const charts = [
    lineChart("live.throughput", {
      series: [{ label: "live.output", class: "first", value: (point) => point.tokens_per_s }, { label: "live.prompt", class: "second", value: (point) => point.prompt_tokens_per_s }],
      format: rate, seconds: SECONDS,
    }),
    lineChart("live.requests", {
      series: [{ label: "live.running", class: "first", value: (point) => point.running }, { label: "live.waiting", class: "second", value: (point) => point.waiting }],
      format: rate, seconds: SECONDS,
    }),
    latency("live.ttft", "ttft_ms"), latency("live.itl", "itl_ms"), latency("live.e2e", "e2e_ms"),
    lineChart("live.kv", {
      series: [{ label: "live.kv_used", class: "first", value: (point) => share(point.kv?.used_blocks, point.kv?.blocks) }, { label: "live.kv_cached", class: "second", value: (point) => share(point.kv?.cached_blocks, point.kv?.blocks) }],
      format: (value) => percent(value), seconds: SECONDS, ceiling: 1,
    }),
  ];
  const experts = heatMap({
    title: "live.experts", note: "live.experts_note",
    // Twice what each would have if all had the same: beyond, the colour gets no deeper.
    most: (rows) => Math.min(1, Math.max(2 / rows[0].values.length, 0.001)),
    describe: {
      value: (value) => `≥ ${percent(value, 1)}`,
      cell: (layer, expert, value) => t("live.expert_cell", { layer, expert, share: percent(value, 1) }),
      row: (row) => t("live.expert_cell", { layer: row.label, expert: row.values.indexOf(Math.max(...row.values)), share: percent(Math.max(...row.values), 1) }),
    },
  });
  const gates = heatMap({
    title: "live.gates", note: "live.gates_note", most: () => 1,
    describe: {
      value: (value) => percent(value),
      cell: (layer, head, value) => t("live.gate_cell", { layer, head, share: percent(value, 1) }),
      row: (row) => t("live.gate_row", { layer: row.label, share: percent(row.values.reduce((a, b) => a + b, 0) / Math.max(1, row.values.length)) }),
    },
  });
  const note = h("p", { class: "muted small", t: "live.dense", hidden: true });
  const element = h("section", { class: "panel", id: "view-live", tLabel: "nav.live" },
    h("header", { class: "view-head" }, h("h1", { t: "live.title" }), status, signIn),
    h("div", { class: "panel-scroll", tabindex: "0", tLabel: "live.title" }, tiles, h("div", { class: "cards" }, charts.map((chart) => chart.element), experts.element, gates.element), note));

  onLanguage(() => {
    showTiles();
    experts.redraw();
    gates.redraw();
  });
  for (const query of ["(prefers-color-scheme: dark)"]) window.matchMedia(query).addEventListener("change", redraw);
  window.addEventListener("ernie-theme", redraw);

  function redraw() {
    requestAnimationFrame(() => {
      experts.redraw();
      gates.redraw();
    });
  }

  function showTiles() {
    if (!latest) return;
    const tile = (label, value, detail) => h("div", { class: "tile" }, h("span", { class: "muted", t: label }), h("strong", {}, value), h("span", { class: "muted small" }, detail));
    const { kv, settings } = latest;
    replace(tiles, [
      tile("live.output", t("live.per_second", { value: rate(latest.tokens_per_s) }), t("live.requests_total", { count: compact(latest.requests_total) })),
      tile("live.running", number(latest.running), t("live.batch", { size: number(settings.max_batch_size), mode: t(settings.dynamic_batching ? "live.dynamic" : "live.static") })),
      tile("live.waiting", number(latest.waiting), t("live.places", { count: number(latest.queue_places) })),
      tile("live.kv", percent(share(kv.used_blocks, kv.blocks) ?? 0, 1), t("live.blocks", { used: number(kv.used_blocks), all: number(kv.blocks) })),
      tile("live.prefix", latest.prefix_lookups > 0 ? percent(latest.prefix_hits / latest.prefix_lookups, 1) : "–", t("live.lookups", { hits: compact(latest.prefix_hits), lookups: compact(latest.prefix_lookups) })),
      tile("live.uptime", duration(latest.uptime_s), latest.model),
    ]);
  }

  function take(event) {
    latest = event;
    points.push(event);
    while (points.length > 0 && points[0].at < event.at - SECONDS) points.shift();
    showTiles();
    charts.forEach((chart) => chart.update(points, event.at));
    experts.update(event.experts?.map(({ layer, share }) => ({ label: layer, values: share })));
    gates.update(event.gates?.map(({ layer, open }) => ({ label: layer, values: open })));
    note.hidden = Boolean(event.experts || event.gates);
  }

  function say(kind, key, values) {
    status.className = `status ${kind}`;
    status.textContent = t(key, values);
  }

  /** Connects, and again when the connection is lost, until the view is left. */
  async function follow(own) {
    let failures = 0;
    while (!own.signal.aborted) {
      const attempt = new AbortController();
      const stop = () => attempt.abort();
      own.signal.addEventListener("abort", stop);
      let silence = setTimeout(stop, SILENCE);
      let refused = null;
      try {
        for await (const data of events(await request("/v1/live", { use: ["admin", "chat"], signal: attempt.signal }))) {
          clearTimeout(silence);
          silence = setTimeout(stop, SILENCE);
          failures = 0;
          signIn.hidden = true;
          say("good", "live.connected");
          const event = JSON.parse(data);
          // The key is not taken any more; the next attempt says so.
          if (event.error) break;
          take(event);
        }
      } catch (error) {
        refused = error;
      }
      clearTimeout(silence);
      own.signal.removeEventListener("abort", stop);
      if (own.signal.aborted) return;
      if (refused?.status === 401 || refused?.status === 403) {
        say("bad", refused.status === 401 ? "error.key" : "live.forbidden");
        signIn.hidden = false;
        return;
      }
      const wait = WAITS[Math.min(failures, WAITS.length - 1)];
      failures += 1;
      say("bad", "live.reconnecting", { seconds: wait / 1000 });
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, wait);
        own.signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
      });
    }
  }

  async function enterKey() {
    const key = await ask("key.title", "key.label", "", { type: "password", action: "key.use", note: "key.note" });
    if (!key?.trim()) return;
    keys.set("chat", key.trim());
    keys.set("admin", "");
    show();
  }

  function show() {
    hide();
    abort = new AbortController();
    if (!latest) say("", "live.connecting");
    follow(abort);
  }

  function hide() {
    abort?.abort();
    abort = null;
  }

  return { element, show, hide, escape: () => false };
}

const share = (part, all) => (all > 0 ? part / all : null);

function duration(seconds) {
  const [days, hours, minutes] = [Math.floor(seconds / 86_400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days > 0) return t("live.days", { days, hours });
  if (hours > 0) return t("live.hours", { hours, minutes });
  return t("live.minutes", { minutes, seconds: Math.floor(seconds) % 60 });
}
