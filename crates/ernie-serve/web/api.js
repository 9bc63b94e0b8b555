// Requests to the server this page came from. Keys live as long as the tab and are sent in a header, never in an address.
import { t } from "./i18n.js";
import { forget, load, save } from "./storage.js";

/** Two keys, for one that may administer need not be allowed to chat. */
export const keys = {
  get: (use) => load(`key.${use}`, "session") ?? "",
  set(use, key) {
    if (key) save(`key.${use}`, key, "session");
    else forget(`key.${use}`, "session");
    window.dispatchEvent(new Event("ernie-key"));
  },
};

/** What the server said, or that it said nothing (status 0). */
export class RequestError extends Error {
  constructor(status, message, code = null, param = null) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** `use`: which key, `chat` or `admin`; several are tried in turn until there is one. */
export async function request(path, { use = ["chat"], method = "GET", body, signal } = {}) {
  const headers = {};
  const key = use.map(keys.get).find((key) => key);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, t("error.unreachable"));
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch {
    throw new RequestError(0, t("error.unreadable"));
  }
}

async function refusal(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // Something between the server and us answered.
  }
  const message = typeof error?.message === "string" ? error.message : t("error.status", { status: response.status });
  return new RequestError(response.status, message, error?.code ?? null, error?.param ?? null);
}

/** The data of server-sent events, one after the other. Ends when the stream ends; throws a RequestError if it breaks. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new RequestError(0, t("error.broken"));
      }
      if (part.done) return;
      rest += part.value;
      const pieces = rest.split(/\r?\n\r?\n/);
      rest = pieces.pop();
      for (const piece of pieces) {
        const data = piece.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).replace(/^ /, ""));
        if (data.length > 0) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
