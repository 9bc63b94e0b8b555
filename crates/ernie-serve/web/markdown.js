// Markdown to elements. What a model writes is not to be trusted: every piece of it becomes a text node or an element of the few kinds below, made by
// name, and no string is ever read as HTML. Tags stay visible as they were written, pictures become links, and only http, https and mailto can be followed.
import { h, icon } from "./dom.js";
import { t } from "./i18n.js";

/** How deep quotes, lists and links may be nested; deeper, they are plain text. */
const DEEPEST = 12;
/** Signs of emphasis in a row; more are a line that somebody drew. */
const LONGEST_RUN = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const TABLE_LINE = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
/** Characters that turn the direction of what follows, with which text can look like what it is not. */
const BIDI = /[\u202a-\u202e\u2066-\u2069]/;

/** Renders a text into an element. Blocks that are as they were before stay, so that a growing text is cheap and what is selected stays selected. */
export function render(target, source) {
  const known = target.blocks ?? [];
  const blocks = split(source.replace(/\r\n?/g, "\n").replaceAll("\0", "\ufffd").split("\n"), 0);
  blocks.forEach((block, index) => {
    if (known[index]?.raw === block.raw && known[index].kind === block.kind) {
      block.node = known[index].node;
      return;
    }
    block.node = build(block, 0);
    if (known[index]) known[index].node.replaceWith(block.node);
    else target.append(block.node);
  });
  for (const block of known.slice(blocks.length)) block.node.remove();
  target.blocks = blocks;
}

/** Lines into blocks: `{kind, raw, …}`. */
function split(lines, depth) {
  const blocks = [];
  let at = 0;
  const take = (kind, from, to, more) => blocks.push({ kind, raw: lines.slice(from, to).join("\n"), ...more });
  while (at < lines.length) {
    const line = lines[at];
    const from = at;
    let match;
    if (line.trim() === "") {
      at += 1;
    } else if ((match = FENCE.exec(line)) && !(match[1][0] === "`" && match[2].includes("`"))) {
      const [, fence, info] = match;
      const end = new RegExp(`^ {0,3}${fence[0] === "`" ? "`" : "~"}{${fence.length},}[ \\t]*$`);
      at += 1;
      while (at < lines.length && !end.test(lines[at])) at += 1;
      // Without its end it goes on to the end of the text: so does one that is still being written.
      take("code", from, Math.min(at + 1, lines.length), { text: lines.slice(from + 1, at).join("\n"), info: info.trim().split(/\s+/)[0] });
      at += 1;
    } else if ((match = HEADING.exec(line))) {
      at += 1;
      take("heading", from, at, { level: match[1].length, text: match[2] ?? "" });
    } else if (RULE.test(line)) {
      at += 1;
      take("rule", from, at);
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      while (at < lines.length && (QUOTE.test(lines[at]) || (lines[at].trim() !== "" && !startsBlock(lines[at])))) at += 1;
      take("quote", from, at, { lines: lines.slice(from, at).map((line) => line.replace(QUOTE, "")) });
    } else if (depth < DEEPEST && ITEM.test(line)) {
      const list = takeList(lines, at);
      at = list.end;
      take("list", from, at, list);
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_LINE.test(lines[at + 1]) && cells(line).length === cells(lines[at + 1]).length) {
      at += 2;
      while (at < lines.length && lines[at].trim() !== "" && lines[at].includes("|") && !startsBlock(lines[at])) at += 1;
      take("table", from, at, { head: cells(line), align: cells(lines[from + 1]).map(alignment), rows: lines.slice(from + 2, at).map(cells) });
    } else {
      at += 1;
      while (at < lines.length && lines[at].trim() !== "" && !startsBlock(lines[at])) at += 1;
      take("paragraph", from, at, { text: lines.slice(from, at).map((line) => line.trim()).join("\n") });
    }
  }
  return blocks;
}

/** Whether a line ends a paragraph. */
function startsBlock(line) {
  const item = ITEM.exec(line);
  // A year with a full stop inside a paragraph is no list.
  const list = item && item[4] && (!/^\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || list;
}

/** Items of a list from line `at` on. */
function takeList(lines, at) {
  const first = ITEM.exec(lines[at]);
  const sign = first[2].at(-1);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== sign || RULE.test(lines[end])) break;
    // What belongs to an item stands as far in as its first word.
    const space = match[3] === undefined || match[3].length > 4 || match[4] === "" ? 1 : match[3].length;
    const inside = match[1].length + match[2].length + space;
    const own = [(match[3] ?? "").slice(space) + (match[4] ?? "")];
    end += 1;
    while (end < lines.length) {
      const line = lines[end];
      const indent = /^ */.exec(line)[0].length;
      if (line.trim() === "") {
        const next = lines.slice(end + 1).find((line) => line.trim() !== "");
        if (next === undefined || /^ */.exec(next)[0].length < inside) break;
        own.push("");
      } else if (indent >= inside || (indent >= 2 && ITEM.test(line.trimStart()) && indent > match[1].length + 1)) {
        own.push(line.slice(Math.min(indent, inside)));
      } else if (!startsBlock(line) && !ITEM.test(line) && own.at(-1) !== "") {
        own.push(line.trimStart());
      } else {
        break;
      }
      end += 1;
    }
    items.push(own);
    // An empty line between items, if another one follows.
    let next = end;
    while (next < lines.length && lines[next].trim() === "") next += 1;
    const follows = next < lines.length ? ITEM.exec(lines[next]) : null;
    if (next > end && follows && follows[2].at(-1) === sign && !RULE.test(lines[next])) {
      loose = true;
      end = next;
    }
  }
  return { ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, items, loose, end };
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignment(cell) {
  if (/^:-+:$/.test(cell)) return "center";
  return cell.endsWith(":") ? "right" : "left";
}

function build(block, depth) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.info);
    case "heading":
      // The page has headings of its own above.
      return inline(h(`h${Math.min(6, block.level + 2)}`), block.text);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, split(block.lines, depth + 1).map((inner) => build(inner, depth + 1)));
    case "list":
      return h(block.ordered ? "ol" : "ul", block.ordered && block.start !== 1 ? { start: block.start } : {}, block.items.map((lines) => item(lines, block.loose, depth)));
    case "table": {
      const row = (tag) => (texts) => h("tr", {}, block.align.map((align, index) => inline(h(tag, { class: `align-${align}` }), texts[index] ?? "")));
      const table = h("table", {}, h("thead", {}, row("th")(block.head)), h("tbody", {}, block.rows.map(row("td"))));
      return h("div", { class: "table-frame", tabindex: "0" }, table);
    }
    default:
      return inline(h("p"), block.text);
  }
}

function item(lines, loose, depth) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  const rest = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
  const blocks = split(rest, depth + 1);
  const nodes = blocks.map((inner, index) => {
    // In a tight list the first paragraph is the item itself.
    if (!loose && index === 0 && inner.kind === "paragraph") return inline(h("span"), inner.text);
    return build(inner, depth + 1);
  });
  const box = task && h("input", { type: "checkbox", checked: task[1] !== " ", disabled: true });
  return h("li", task ? { class: "task" } : {}, box, nodes);
}

function codeBlock(code, language) {
  const label = h("span", { t: "code.copy" });
  const copy = h("button", { type: "button", class: "quiet" }, icon("copy"), label);
  copy.addEventListener("click", async () => {
    const done = await copyText(code);
    label.textContent = t(done ? "code.copied" : "code.failed");
    setTimeout(() => (label.textContent = t("code.copy")), 1500);
  });
  const head = h("div", { class: "code-head" }, h("span", {}, clip(language, 30)), copy);
  return h("div", { class: "code-block" }, head, h("pre", { tabindex: "0" }, plain(h("code"), code)));
}

/** Whether it worked: the clipboard is for secure contexts, and may be forbidden. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "off-screen", value: text, "aria-hidden": "true" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus?.();
    return done;
  }
}

const clip = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text);

/** Text as it is, with characters that turn its direction made visible. */
function plain(target, text) {
  if (!BIDI.test(text)) {
    target.append(text);
    return target;
  }
  for (const part of text.split(/([\u202a-\u202e\u2066-\u2069])/)) {
    if (BIDI.test(part)) {
      const name = `U+${part.codePointAt(0).toString(16).toUpperCase()}`;
      target.append(h("span", { class: "invisible-character", tTitle: "code.bidi" }, name));
    } else if (part) target.append(part);
  }
  return target;
}

const ESCAPABLE = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", hellip: "…", mdash: "—", ndash: "–" };
const AUTOLINK = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i;
const BARE = /^https?:\/\/[^\s<>"'`\u3000-\u303f\uff00-\uffef]{1,2000}/i;

/** The inner part of a line of text: code, emphasis, links. One pass over the characters, then one over the signs of emphasis. */
function inline(target, text, depth = 0) {
  const nodes = [];
  let buffer = "";
  const flush = () => {
    if (buffer) nodes.push({ text: buffer });
    buffer = "";
  };
  // Where runs of backticks of each length are, so that looking for the end is not done again and again.
  const missing = new Set();
  let brackets = 0;
  for (let at = 0; at < text.length; ) {
    const c = text[at];
    let match;
    if (c === "\\" && at + 1 < text.length) {
      if (text[at + 1] === "\n") {
        flush();
        nodes.push({ node: h("br") });
        at += 2;
      } else if (ESCAPABLE.includes(text[at + 1])) {
        buffer += text[at + 1];
        at += 2;
      } else {
        buffer += c;
        at += 1;
      }
    } else if (c === "`") {
      const run = /^`+/.exec(text.slice(at, at + 200))[0];
      const end = missing.has(run.length) ? -1 : closing(text, at + run.length, run.length);
      if (end < 0) {
        missing.add(run.length);
        buffer += run;
        at += run.length;
      } else {
        flush();
        let code = text.slice(at + run.length, end).replaceAll("\n", " ");
        if (code.trim() !== "" && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
        nodes.push({ node: plain(h("code"), code) });
        at = end + run.length;
      }
    } else if (c === "\n") {
      // A model means the line breaks it writes.
      buffer = buffer.trimEnd();
      flush();
      nodes.push({ node: h("br") });
      at += 1;
    } else if (c === "&" && (match = /^&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([a-z]{2,8}));/.exec(text.slice(at, at + 12)))) {
      const code = match[1] ? Number(match[1]) : match[2] ? Number.parseInt(match[2], 16) : null;
      const character = code === null ? ENTITIES[match[3]] : code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
      buffer += character ?? match[0];
      at += match[0].length;
    } else if (c === "<" && (match = AUTOLINK.exec(text.slice(at, at + 2100)))) {
      flush();
      nodes.push({ node: link(match[1], [match[1]]) });
      at += match[0].length;
    } else if ((c === "h" || c === "H") && !/\w$/.test(buffer.slice(-1)) && (match = BARE.exec(text.slice(at, at + 2100)))) {
      const address = trimAddress(match[0]);
      flush();
      nodes.push({ node: link(address, [address]) });
      at += address.length;
    } else if ((c === "[" || (c === "!" && text[at + 1] === "[")) && depth < DEEPEST && brackets < 500) {
      brackets += 1;
      const found = bracket(text, at + (c === "!" ? 1 : 0));
      if (found) {
        flush();
        const label = document.createDocumentFragment();
        inline(label, found.label, DEEPEST);
        // A picture would be fetched from wherever the model says: its name and a link will do.
        const children = c === "!" ? [t("code.picture", { name: found.label || found.address })] : [label];
        nodes.push({ node: link(found.address, children) });
        at = found.end;
      } else {
        buffer += c;
        at += 1;
      }
    } else if (c === "*" || c === "_" || c === "~") {
      const run = text.slice(at, at + 200).match(c === "*" ? /^\*+/ : c === "_" ? /^_+/ : /^~+/)[0];
      if (run.length > LONGEST_RUN) buffer += run;
      else {
        flush();
        nodes.push(delimiter(text, at, run));
      }
      at += run.length;
    } else {
      // As far as there is nothing special.
      const plainRun = /^[^\\`\n&<hH[!*_~]+/.exec(text.slice(at, at + 1000))?.[0] ?? c;
      buffer += plainRun;
      at += plainRun.length;
    }
  }
  flush();
  emphasise(nodes, target);
  return target;
}

function closing(text, from, length) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === length) return at;
    at = end;
  }
  return -1;
}

/** `[label](address "title")` at `at`. */
function bracket(text, at) {
  let depth = 0;
  let end = at;
  const last = Math.min(text.length, at + 2000);
  for (; end < last; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]" && --depth === 0) break;
  }
  if (end >= last || text[end + 1] !== "(") return null;
  const match = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/.exec(text.slice(end + 1, end + 3000));
  return match && { label: text.slice(at + 1, end), address: (match[1] ?? match[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"), end: end + 1 + match[0].length };
}

/** An address without the punctuation of the sentence around it. */
function trimAddress(address) {
  let trimmed = address.replace(/[.,:;!?*_~。，；：！？]+$/, "");
  while (trimmed.endsWith(")") && trimmed.split("(").length < trimmed.split(")").length) trimmed = trimmed.slice(0, -1);
  return trimmed;
}

/** A link, if it leads where a link may lead; else its text with the address behind it. */
function link(address, children) {
  const url = safeAddress(address);
  if (url === null) {
    return h("span", { class: "refused-link" }, children, address ? plain(h("span", { class: "muted" }), ` (${clip(address, 200)})`) : null);
  }
  // The title is the address as the browser reads it, letters of other scripts in a host name written out.
  return h("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

export function safeAddress(address) {
  let url;
  try {
    url = new URL(address.trim());
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) && !url.username && !url.password ? url.href : null;
}

const isSpace = (c) => c === "" || /\s/.test(c);
const isMark = (c) => /[\p{P}\p{S}]/u.test(c);

/** A run of signs of emphasis, and whether it can open and close, by CommonMark's rules. */
function delimiter(text, at, run) {
  const before = at > 0 ? text[at - 1] : "";
  const after = text[at + run.length] ?? "";
  const cjk = (c) => /[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f]/.test(c);
  // Chinese has no spaces, and its punctuation stands close: there **“bold”** would be none by the rules for English.
  const left = !isSpace(after) && (!isMark(after) || isSpace(before) || isMark(before) || cjk(before));
  const right = !isSpace(before) && (!isMark(before) || isSpace(after) || isMark(after) || cjk(after));
  const word = run[0] === "_";
  return { sign: run[0], count: run.length, opens: left && (!word || !right || isMark(before)), closes: right && (!word || !left || isMark(after)) };
}

/** Pairs the signs, then builds. */
function emphasise(nodes, target) {
  const openers = [];
  for (let index = 0; index < nodes.length; index += 1) {
    const closer = nodes[index];
    if (!closer.sign) continue;
    closer.left = closer.count;
    closer.starts = [];
    closer.ends = [];
    while (closer.closes && closer.left > 0) {
      let place = openers.length - 1;
      // Not farther than some: a long row of stars is nobody's emphasis.
      const lowest = Math.max(0, openers.length - 32);
      while (place >= lowest && !(openers[place].sign === closer.sign && openers[place].left > 0)) place -= 1;
      if (place < lowest) break;
      const opener = openers[place];
      const size = Math.min(2, opener.left, closer.left);
      const strike = closer.sign === "~";
      if (strike && size < 2) break;
      opener.left -= size;
      closer.left -= size;
      const tag = strike ? "del" : size === 2 ? "strong" : "em";
      opener.starts.unshift(tag);
      closer.ends.push(tag);
      openers.length = opener.left > 0 ? place + 1 : place;
    }
    if (closer.opens && closer.left > 0) openers.push(closer);
  }
  const stack = [target];
  for (const node of nodes) {
    if (node.node) stack.at(-1).append(node.node);
    else if (node.text !== undefined) plain(stack.at(-1), node.text);
    else {
      for (const _ of node.ends) if (stack.length > 1) stack.pop();
      if (node.left > 0) stack.at(-1).append(node.sign.repeat(node.left));
      for (const tag of node.starts) {
        // Too deep: what is inside is shown without it.
        const element = stack.length > DEEPEST ? stack.at(-1) : h(tag);
        if (element !== stack.at(-1)) stack.at(-1).append(element);
        stack.push(element);
      }
    }
  }
}
