// Elements from code. Text is always text: nothing here, and nothing in the page, turns a string into markup.
import { t } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element with attributes, listeners and children (nodes, strings, or lists of them; null and false are left out).
 * `t`, `tLabel`, `tTitle`, `tPlaceholder`: keys of texts that follow the language.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else if (name === "t" || name === "tLabel" || name === "tTitle" || name === "tPlaceholder") element.dataset[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  speak(element);
  add(element, children);
  return element;
}

export function add(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child);
  }
  return parent;
}

export function replace(parent, ...children) {
  parent.replaceChildren();
  return add(parent, children);
}

/** Sets what an element says in the present language. */
function speak(element) {
  const { t: text, tLabel, tTitle, tPlaceholder } = element.dataset;
  if (text) element.textContent = t(text);
  if (tLabel) element.setAttribute("aria-label", t(tLabel));
  if (tTitle) element.title = t(tTitle);
  if (tPlaceholder) element.placeholder = t(tPlaceholder);
}

/** After a change of language. */
export function speakAll(root = document) {
  for (const element of root.querySelectorAll("[data-t],[data-t-label],[data-t-title],[data-t-placeholder]")) speak(element);
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return add(element, children);
}

// Outlines on a grid of 24.
const ICONS = {
  chat: "M4 5.500h16v11h-9.500L6 20v-3.500H4z",
  live: "M3 12h4l3-7 4 14 3-7h4",
  admin: "M12 3l7.500 3v5.500c0 4.500-3.200 8-7.500 9.500-4.300-1.500-7.500-5-7.500-9.500V6zM9 12l2.200 2.200L15.500 10",
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M13 7a2 2 0 104 0 2 2 0 10-4 0M7 17a2 2 0 104 0 2 2 0 10-4 0",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 12.500l4.500 4.500L19 7.500",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  again: "M19 12a7 7 0 11-2.300-5.200M19 4v4h-4",
  trash: "M5 7h14M10 7V4.500h4V7M7 7l1 13h8l1-13",
  bars: "M5 20v-6M12 20V5M19 20v-9",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  close: "M6 6l12 12M18 6L6 18",
  sun: "M12 8a4 4 0 100 8 4 4 0 100-8M12 3v1.500M12 19.500V21M3 12h1.500M19.500 12H21M5.600 5.600l1 1M17.400 17.400l1 1M18.400 5.600l-1 1M6.600 17.400l-1 1",
  moon: "M19.500 14.500A8 8 0 119.500 4.500a6.500 6.500 0 0010 10z",
  help: "M9.500 9.500a2.500 2.500 0 113.800 2.100c-.8.5-1.300 1-1.300 1.900M12 16.800h.01M12 3.500a8.500 8.500 0 100 17 8.500 8.500 0 100-17",
  key: "M4 15.500a4.500 4.500 0 109 0 4.500 4.500 0 10-9 0M11.800 12.200L20 4M16.500 7.500L19 10M13.800 10.200L15.500 12",
  down: "M12 5v14M6 13l6 6 6-6",
  download: "M12 4v11M7.500 11l4.500 4.500 4.500-4.500M5 20h14",
  upload: "M12 16V5M7.500 9L12 4.500 16.500 9M5 20h14",
  warning: "M12 4.500L21 20H3zM12 10v4.500M12 17.200h.01",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button that shows a picture only; its name is read out and shown on hover. */
export function iconButton(name, label, onClick, props = {}) {
  const { class: more = "", ...rest } = props;
  return h("button", { type: "button", class: `icon-button ${more}`, tLabel: label, tTitle: label, on: { click: onClick }, ...rest }, icon(name));
}
