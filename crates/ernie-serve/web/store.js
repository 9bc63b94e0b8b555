// Conversations, kept in this browser. Each has its own entry, so that two tabs do not overwrite each other's.
import { t } from "./i18n.js";
import { forget, load, names, save } from "./storage.js";

const ENTRY = "chat.";
const FORMAT = "ernie-conversations";
/** Longest title, characters. */
const TITLE = 60;

export function create() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system: "", messages: [] };
}

function newId() {
  // crypto.randomUUID is for secure contexts only; a server on a company's network may be plain HTTP.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** All, the latest first. */
export function list() {
  const all = names(ENTRY).map((name) => clean(load(name))).filter((conversation) => conversation !== null);
  return all.sort((a, b) => b.updated - a.updated);
}

export const find = (id) => clean(load(ENTRY + id));

/** Whether it is kept; one without messages is not worth keeping. */
export function keep(conversation, touch = true) {
  if (conversation.messages.length === 0) return true;
  if (touch) conversation.updated = Date.now();
  return save(ENTRY + conversation.id, clean(conversation));
}

export function remove(id) {
  forget(ENTRY + id);
}

/** The title, or the beginning of the first question. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user")?.content.trim().split("\n")[0] ?? "";
  const characters = Array.from(first);
  if (characters.length === 0) return t("chat.untitled");
  return characters.length > TITLE ? `${characters.slice(0, TITLE).join("")}…` : first;
}

/** Only what a conversation has, each of the right kind; null if it is none. */
function clean(value) {
  if (typeof value !== "object" || value === null || typeof value.id !== "string" || !Array.isArray(value.messages)) return null;
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const message = (message) => {
    if (typeof message !== "object" || message === null || !["user", "assistant"].includes(message.role)) return [];
    const kept = { role: message.role, content: text(message.content) };
    for (const name of ["error", "finish", "model"]) if (typeof message[name] === "string") kept[name] = message[name];
    for (const name of ["tokens", "seconds", "first"]) if (Number.isFinite(message[name])) kept[name] = message[name];
    return [kept];
  };
  return {
    id: value.id.slice(0, 64),
    title: text(value.title).slice(0, 200),
    created: time(value.created),
    updated: time(value.updated),
    system: text(value.system),
    messages: value.messages.flatMap(message),
  };
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations: conversations.map(clean) }, null, 2);
}

export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push(`> **${t("role.system")}:** ${conversation.system.replaceAll("\n", "\n> ")}`);
  for (const message of conversation.messages) parts.push(`## ${t(`role.${message.role}`)}`, message.content.trim());
  return `${parts.join("\n\n")}\n`;
}

/** Adds what a file holds, under new names where there is one already. Returns how many; throws if the file is something else. */
export function importFrom(content) {
  const value = JSON.parse(content);
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) throw new Error("format");
  let count = 0;
  for (const one of value.conversations) {
    const conversation = clean(one);
    if (conversation === null || conversation.messages.length === 0) continue;
    if (!/^[\w-]{1,64}$/.test(conversation.id) || find(conversation.id) !== null) conversation.id = newId();
    if (!save(ENTRY + conversation.id, conversation)) throw new Error("full");
    count += 1;
  }
  return count;
}
