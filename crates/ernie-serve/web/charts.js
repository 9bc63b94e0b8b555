// Small charts in SVG and maps on canvas: no library, colours from the style sheet.
import { h, replace, svg } from "./dom.js";
import { locale, onLanguage, t } from "./i18n.js";

const WIDTH = 320;
const HEIGHT = 96;
/** Seconds without a point after which a line is broken. */
const GAP = 4;

/**
 * Lines over time. `series`: `[{label (key of a text), value (of a point), class}]`, `format`: of a number, `seconds`: how much is shown at most,
 * `ceiling`: the top of the scale if it is fixed.
 */
export function lineChart(title, { series, format, seconds, ceiling = null }) {
  const paths = series.map((one) => svg("path", { class: `line ${one.class}` }));
  const fill = svg("path", { class: `fill ${series[0].class}` });
  const grid = [0, 0.5, 1].map((part) => svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y(part), y2: y(part) }));
  const cross = svg("line", { class: "cross", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "chart", role: "img" }, grid, fill, paths, cross);
  const values = series.map(() => h("b"));
  const legend = h("div", { class: "legend" }, series.map((one, index) => h("span", { class: one.class }, h("i"), h("span", { t: one.label }), values[index])));
  const top = h("span", { class: "axis top" });
  const [from, to] = [h("span"), h("span")];
  const heading = h("h3", { t: title });
  const element = h("figure", { class: "card curve" }, h("figcaption", {}, heading, legend), h("div", { class: "plot" }, picture, top), h("div", { class: "axis-line" }, from, to));
  let points = [];
  let end = 0;
  let scale = 1;
  let span = seconds;
  let pointed = null;

  function y(part) {
    return HEIGHT - 2 - part * (HEIGHT - 6);
  }

  function update(all, now) {
    [points, end] = [all.filter((point) => point.at > now - seconds), now];
    // Whole minutes, as many as there are: a page just opened shows more than a blank.
    span = Math.min(seconds, Math.max(1, Math.ceil((now - (points[0]?.at ?? now)) / 60)) * 60);
    const all_values = points.flatMap((point) => series.map((one) => one.value(point) ?? 0));
    scale = ceiling ?? nice(Math.max(...all_values, 0));
    top.textContent = format(scale);
    from.textContent = t("live.minutes_ago", { minutes: span / 60 });
    to.textContent = t("live.now");
    const x = (point) => WIDTH - ((end - point.at) / span) * WIDTH;
    series.forEach((one, index) => {
      let path = "";
      let area = "";
      let last = null;
      let start = 0;
      for (const point of points) {
        const value = one.value(point);
        if (value === null || value === undefined) {
          continue;
        }
        const place = `${x(point).toFixed(1)} ${y(Math.min(1, value / scale)).toFixed(1)}`;
        const joined = last && point.at - last.at <= GAP;
        if (!joined && last) area += `L${x(last).toFixed(1)} ${y(0)}L${start} ${y(0)}Z`;
        if (!joined) start = x(point).toFixed(1);
        path += `${joined ? "L" : "M"}${place}`;
        area += `${joined ? "L" : "M"}${place}`;
        last = point;
      }
      if (last) area += `L${x(last).toFixed(1)} ${y(0)}L${start} ${y(0)}Z`;
      paths[index].setAttribute("d", path);
      if (index === 0) fill.setAttribute("d", area);
    });
    tell();
  }

  /** The values of the point under the pointer, else the latest. */
  function tell() {
    let point = points.at(-1);
    if (pointed !== null && points.length > 0) {
      const at = end - (1 - pointed) * span;
      point = points.reduce((best, one) => (Math.abs(one.at - at) < Math.abs(best.at - at) ? one : best));
      const place = WIDTH - ((end - point.at) / span) * WIDTH;
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      from.textContent = new Intl.DateTimeFormat(locale(), { timeStyle: "medium" }).format(new Date(point.at * 1000));
    }
    cross.setAttribute("visibility", pointed === null ? "hidden" : "visible");
    const said = series.map((one, index) => {
      const value = point ? one.value(point) : null;
      values[index].textContent = value === null || value === undefined ? "–" : format(value);
      return `${t(one.label)} ${values[index].textContent}`;
    });
    picture.setAttribute("aria-label", `${t(title)}: ${said.join(", ")}`);
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    pointed = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    tell();
  });
  picture.addEventListener("pointerleave", () => {
    pointed = null;
    from.textContent = t("live.minutes_ago", { minutes: span / 60 });
    tell();
  });
  onLanguage(() => update(points, end));
  update([], 0);
  return { element, update };
}

/** The next number of 1, 2, 5 and their tens. */
export function nice(value) {
  if (!(value > 0)) return 1;
  const ten = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * ten).find((step) => step >= value * 1.02) ?? 10 * ten;
}

/** Rows of cells, deeper in colour where there is more. `describe(row, column, value)`: what is said of a cell. `most`: of which value the colour is full. */
export function heatMap({ title, note, describe, most }) {
  const canvas = h("canvas", { role: "img", tabindex: "0" });
  const labels = h("div", { class: "heat-labels", "aria-hidden": "true" });
  const told = h("p", { class: "muted small heat-told", "aria-live": "polite" });
  const [low, high] = [h("span"), h("span")];
  const scale = h("div", { class: "heat-scale muted small", "aria-hidden": "true" }, low, h("i"), high);
  const element = h("figure", { class: "card wide heat", hidden: true },
    h("figcaption", {}, h("h3", { t: title }), scale), h("p", { class: "muted small", t: note }), h("div", { class: "heat-frame" }, labels, canvas), told);
  let rows = [];
  let pointed = null;

  function update(next) {
    rows = next ?? [];
    element.hidden = rows.length === 0;
    if (!element.hidden) draw();
  }

  function draw() {
    const columns = Math.max(...rows.map((row) => row.values.length));
    const width = canvas.clientWidth || 600;
    const height = Math.max(8, Math.min(22, Math.floor(420 / rows.length)));
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = `${height * rows.length}px`;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * rows.length * ratio)];
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(element);
    const [ink, ground] = [style.getPropertyValue("--accent").trim(), style.getPropertyValue("--track").trim()];
    const full = most(rows);
    const gap = width / columns > 6 ? 2 : 0;
    rows.forEach((row, index) => {
      row.values.forEach((value, column) => {
        const [left, right] = [Math.round((column * width) / columns), Math.round(((column + 1) * width) / columns)];
        const box = [left, index * height, right - left - gap, height - (height > 6 ? 2 : 0)];
        context.globalAlpha = 1;
        context.fillStyle = ground;
        context.fillRect(...box);
        context.globalAlpha = Math.min(1, value / full);
        context.fillStyle = ink;
        context.fillRect(...box);
      });
    });
    context.globalAlpha = 1;
    if (pointed) {
      context.strokeStyle = style.getPropertyValue("--text").trim();
      context.strokeRect((pointed.column * width) / columns + 0.5, pointed.row * height + 0.5, width / columns - gap - 1, height - 2);
    }
    replace(labels, rows.map((row) => h("span", {}, height >= 12 || row.label % 4 === 0 ? String(row.label) : "")));
    labels.style.gridAutoRows = `${height}px`;
    low.textContent = "0";
    high.textContent = describe.value(full);
    tell();
  }

  function tell() {
    const row = pointed && rows[pointed.row];
    const value = row?.values[pointed.column];
    told.textContent = value === undefined ? t("live.heat_hint") : describe.cell(row.label, pointed.column, value);
    canvas.setAttribute("aria-label", `${t(title)}. ${rows.map((row) => describe.row(row)).slice(0, 80).join(". ")}`);
  }

  function point(row, column) {
    pointed = row === null || rows.length === 0 ? null : { row: Math.min(rows.length - 1, Math.max(0, row)), column: Math.min(rows[0].values.length - 1, Math.max(0, column)) };
    if (rows.length > 0) draw();
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    point(Math.floor(((event.clientY - box.top) / box.height) * rows.length), Math.floor(((event.clientX - box.left) / box.width) * (rows[0]?.values.length ?? 1)));
  });
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && point(0, 0));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    point((pointed?.row ?? 0) + step[0], (pointed?.column ?? 0) + step[1]);
  });
  new ResizeObserver(() => rows.length > 0 && draw()).observe(element);
  return { element, update, redraw: () => rows.length > 0 && draw() };
}

/** Bars side by side. `bars`: `[{label, value, text}]`, `format`: of a number. */
export function barChart(bars, label, format) {
  const most = nice(Math.max(...bars.map((bar) => bar.value), 0));
  const column = (bar) => {
    const fill = h("i");
    fill.style.height = `${Math.max(bar.value > 0 ? 1.5 : 0, (bar.value / most) * 100)}%`;
    return h("div", { class: "bar", title: `${bar.label}: ${bar.text}` }, h("div", { class: "bar-track" }, fill));
  };
  const ends = bars.length > 1 ? [bars[0].label, bars.at(-1).label] : bars.map((bar) => bar.label);
  return h("div", { class: "bars", role: "img", "aria-label": `${label}: ${bars.map((bar) => `${bar.label} ${bar.text}`).join(", ")}` },
    h("div", { class: "bars-plot" }, bars.map(column), h("span", { class: "axis top" }, format(most))), h("div", { class: "axis-line" }, ends.map((end) => h("span", {}, end))));
}
