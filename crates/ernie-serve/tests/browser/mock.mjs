// A stand-in for the server: the page with its real headers, answers that misbehave on demand, live events, and the admin API in memory.
import { readFile } from "node:fs/promises";
import http from "node:http";
import path from "node:path";
import { fileURLToPath } from "node:url";

const crate = path.join(path.dirname(fileURLToPath(import.meta.url)), "../..");
export const ADMIN_KEY = "sk-admin-for-tests";
export const CHAT_KEY = "sk-chat-for-tests";
const KINDS = { ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml" };

/** What a hostile model may write. */
export const HOSTILE = [
  "<script>window.pwned = 1</script>",
  "<img src=x onerror=\"window.pwned = 1\">",
  "<svg onload=\"window.pwned = 1\"><animate onbegin=\"window.pwned = 1\"/></svg>",
  "<iframe srcdoc=\"<script>parent.pwned = 1</script>\"></iframe>",
  "<math><mi xlink:href=\"javascript:window.pwned=1\">x</mi></math>",
  "<style>* { display: none }</style><form action=https://evil.example><input name=q></form>",
  "[plain](javascript:window.pwned=1)",
  "[case](JaVaScRiPt:window.pwned=1)",
  "[space](  java\tscript:window.pwned=1)",
  "[entity](&#106;avascript:window.pwned=1)",
  "[control](\u0001javascript:window.pwned=1)",
  "[data](data:text/html,<script>window.pwned=1</script>)",
  "[vb](vbscript:msgbox) [file](file:///etc/passwd) [blob](blob:http://x/y) [relative](/admin/api/keys) [slashes](//evil.example/x)",
  "[user](https://bank.example@evil.example/)",
  "![picture](https://evil.example/track.png) ![](javascript:window.pwned=1)",
  "[quote\" onmouseover=\"window.pwned=1](https://good.example/\"onmouseover=\"window.pwned=1)",
  "[\u043f\u0430\u0443\u0440\u0430\u04cf](https://\u0440\u0430\u0443\u0440\u0430l.example/)",
  "<javascript:window.pwned=1> <https://good.example/a?b=c> https://good.example/bare.",
  "user\u202etxt.exe and \u2066isolated\u2069 \u200bzero\u200bwidth",
  "`<img src=x onerror=window.pwned=1>` **<b onclick=window.pwned=1>bold</b>**",
  "```html\"><script>window.pwned=1</script>\n<img src=x onerror=window.pwned=1>\n\u202e;drop\n```",
  "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| [x](javascript:window.pwned=1) | <svg/onload=window.pwned=1> |",
  "[ref]: javascript:window.pwned=1\n[ref]",
  "x".repeat(3000) + " " + "*".repeat(3000) + "[".repeat(3000) + ">".repeat(200) + "`".repeat(999),
].join("\n\n");

const MARKDOWN = `## A plan

Some **bold**, *slanted*, ~~struck~~ and \`inline code\`, and a [link](https://www.rust-lang.org/).

1. First of all
2. Then
   - with a part
   - and another
3. Done

> A quotation
> of two lines

| name | speed | unit |
|:-----|------:|:----:|
| one  | 12.5  | tok/s |
| two  | 48.0  | tok/s |

\`\`\`rust
fn main() {
    println!("Hello, ernie");
}
\`\`\`

- [x] written
- [ ] read

---

中文也可以：**“粗体”**与\`代码\`。`;

function files() {
  return async (name) => {
    const [page, source] = await Promise.all([readFile(path.join(crate, "web", name)), readFile(path.join(crate, "src/page.rs"), "utf8")]);
    const policy = /const POLICY: &str = "([\s\S]*?)";/.exec(source)[1].replace(/\\\n\s*/g, "");
    return { page, headers: { "content-type": KINDS[path.extname(name)], "content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache" } };
  };
}

/** Starts it on a free port, or on one that is given. */
export async function start(port = 0) {
  const read = files();
  const state = { requests: [], live: new Set(), keys: demoKeys(), audit: demoAudit(), settings: { dynamic_batching: true, max_batch_size: 16 }, next: 1 };
  const server = http.createServer((request, response) => {
    answer(request, response, state, read).catch((error) => {
      if (!response.headersSent) send(response, 500, { error: { message: String(error), type: "server_error", param: null, code: null } });
      else response.destroy();
    });
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  const stop = () => new Promise((resolve) => {
    server.closeAllConnections();
    server.close(resolve);
  });
  return { url: `http://127.0.0.1:${server.address().port}`, port: server.address().port, state, stop };
}

function send(response, status, body) {
  response.writeHead(status, { "content-type": "application/json" });
  response.end(JSON.stringify(body));
}

const fail = (response, status, message, code = null) => send(response, status, { error: { message, type: "invalid_request_error", param: null, code } });

async function body(request) {
  let text = "";
  for await (const part of request) text += part;
  return text ? JSON.parse(text) : null;
}

async function answer(request, response, state, read) {
  const url = new URL(request.url, "http://localhost");
  const key = request.headers.authorization?.replace(/^Bearer /, "");
  if (url.pathname === "/" || url.pathname.startsWith("/assets/")) {
    const { page, headers } = await read(url.pathname === "/" ? "index.html" : path.basename(url.pathname));
    response.writeHead(200, headers);
    response.end(page);
  } else if (url.pathname === "/v1/models") {
    send(response, 200, { object: "list", data: [{ id: "ernie-4.5-21b", object: "model", max_model_len: 4096 }] });
  } else if (url.pathname === "/v1/chat/completions") {
    await chat(request, response, state, key);
  } else if (url.pathname === "/v1/live") {
    live(request, response, state);
  } else if (url.pathname.startsWith("/admin/api/")) {
    if (key !== ADMIN_KEY && key !== CHAT_KEY) return fail(response, 401, "Incorrect API key provided.", "invalid_api_key");
    await admin(request, response, state, url, key);
  } else fail(response, 404, "There is nothing here.");
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function chat(request, response, state, key) {
  const asked = await body(request);
  state.requests.push(asked);
  const last = asked.messages.at(-1).content;
  if (last.startsWith("locked") && key !== CHAT_KEY) return fail(response, 401, "Incorrect API key provided.", "invalid_api_key");
  if (last.startsWith("refuse")) return fail(response, 400, "This model's maximum context length is 512 tokens; this request needs 900.", "context_length_exceeded");
  const text = last.startsWith("hostile") ? HOSTILE : last.startsWith("markdown") ? MARKDOWN
    : last.startsWith("long") ? Array.from({ length: 400 }, (_, index) => `word${index}`).join(" ")
    : `Answer ${state.requests.length} to: ${last}. 你好！`;
  const pieces = last.startsWith("hostile") ? text.match(/[\s\S]{1,400}/gu) : text.match(/\S+\s*|\s+/gu);
  response.writeHead(200, { "content-type": "text/event-stream" });
  const head = { id: "chatcmpl-1", object: "chat.completion.chunk", created: 1, model: "ernie-4.5-21b" };
  const event = (choice, more = {}) => response.write(`data: ${JSON.stringify({ ...head, choices: choice ? [{ index: 0, finish_reason: null, logprobs: null, ...choice }] : [], ...more })}\n\n`);
  event({ delta: { role: "assistant", content: "" } });
  response.on("close", () => (state.closed = !response.writableFinished));
  for (const [index, piece] of pieces.entries()) {
    if (response.destroyed) return;
    const p = [0.97, 0.8, 0.55, 0.34, 0.08][index % 5];
    const token = (text, p) => ({ token: text, logprob: Math.log(p), bytes: [...Buffer.from(text)] });
    const logprobs = asked.logprobs ? { content: [{ ...token(piece, p), top_logprobs: [token(piece, p), token(" other", (1 - p) / 2), token("\n", (1 - p) / 4)] }] } : null;
    event({ delta: { content: piece }, logprobs });
    if (last.startsWith("die") && index === 3) {
      await pause(50);
      // As a process that is killed: no end, no farewell.
      return response.socket.destroy();
    }
    if (last.startsWith("broken") && index === 2) {
      response.write(`data: ${JSON.stringify({ error: { message: "The answer was cut off: the server is stopping.", type: "server_error", param: null, code: null } })}\n\n`);
      response.end("data: [DONE]\n\n");
      return;
    }
    await pause(last.startsWith("long") ? 12 : 5);
  }
  event({ delta: {}, finish_reason: "stop" });
  event(null, { usage: { prompt_tokens: 10, completion_tokens: pieces.length, total_tokens: 10 + pieces.length } });
  response.end("data: [DONE]\n\n");
}

/** One moment of a busy server, the same for the same time. */
function moment(at, state) {
  const wave = (period, phase = 0) => Math.sin((at / period) * 2 * Math.PI + phase);
  const share = (layer, expert) => Math.max(0.001, (1 + 0.9 * Math.sin(layer * 12.9 + expert * 78.2) + 0.2 * wave(40, expert)) / 64);
  const layers = Array.from({ length: 27 }, (_, layer) => {
    const raw = Array.from({ length: 64 }, (_, expert) => share(layer + 1, expert));
    const sum = raw.reduce((a, b) => a + b);
    return { layer: layer + 1, share: raw.map((value) => Math.round((value / sum) * 1e4) / 1e4) };
  });
  const gates = Array.from({ length: 28 }, (_, layer) => ({ layer, open: Array.from({ length: 20 }, (_, head) => Math.round((0.5 + 0.5 * Math.sin(layer * 3.3 + head * 1.7)) * 1e4) / 1e4) }));
  const ms = (base) => ({ p50: base * (1 + 0.15 * wave(70)), p99: base * (2.4 + 0.6 * wave(50, 1)) });
  return {
    at, uptime_s: 93_784, model: "ernie-4.5-21b", running: Math.round(9 + 5 * wave(80)), waiting: Math.max(0, Math.round(3 * wave(60, 2))), queue_places: 128, streams: 7, requests_total: 48_211,
    tokens_per_s: 142 + 30 * wave(80), prompt_tokens_per_s: 610 + 240 * wave(45, 1), requests_per_s: 1.4, ttft_ms: ms(180), itl_ms: ms(42), e2e_ms: ms(5200),
    kv: { used_blocks: Math.round(1800 + 700 * wave(80)), cached_blocks: 900, blocks: 4096 }, prefix_hits: 1_203_441, prefix_lookups: 1_900_122, experts: layers, gates, settings: state.settings,
  };
}

function live(request, response, state) {
  response.writeHead(200, { "content-type": "text/event-stream" });
  state.live.add(response);
  // A past comes at once, so that curves can be looked at.
  const now = Math.floor(Date.now() / 1000);
  for (let at = now - (state.past ?? 0); at <= now; at += 1) response.write(`data: ${JSON.stringify(moment(at, state))}\n\n`);
  const timer = setInterval(() => response.write(`data: ${JSON.stringify(moment(Math.floor(Date.now() / 1000), state))}\n\n`), 1000);
  response.on("close", () => {
    clearInterval(timer);
    state.live.delete(response);
  });
}

async function admin(request, response, state, url, key) {
  const at = Math.floor(Date.now() / 1000);
  const route = url.pathname.slice("/admin/api/".length);
  if (route === "session") {
    const scopes = key === ADMIN_KEY ? ["admin"] : ["chat"];
    return send(response, 200, { open: false, key: { id: "key_1", name: key === ADMIN_KEY ? "operations" : "somebody", scopes }, currency: "EUR", energy: "modelled" });
  }
  if (key !== ADMIN_KEY) return fail(response, 403, "This key does not have the scope admin.", "insufficient_scope");
  const given = request.method === "GET" ? null : await body(request);
  const note = (action, target, detail) => state.audit.unshift({ id: state.audit.length + 1, at, actor: "operations", action, target, detail });
  const one = /^keys\/([^/]+)(\/revoke)?$/.exec(route);
  if (route === "keys" && request.method === "GET") send(response, 200, { data: state.keys });
  else if (route === "keys") {
    if (given.scopes.length === 0) return fail(response, 400, "`scopes`: expected at least one scope");
    const made = { ...emptyKey, id: `key_${100 + state.next}`, created: at, ...given };
    state.next += 1;
    state.keys.push(made);
    note("key.create", made.name, null);
    send(response, 201, { ...made, key: "sk-7f3a91c0d55e4b2f8a6d-shown-once" });
  } else if (one) {
    const found = state.keys.find((key) => key.id === one[1]);
    if (!found) return fail(response, 404, "There is no such key.");
    if (one[2]) found.revoked = at;
    else Object.assign(found, given);
    note(one[2] ? "key.revoke" : "key.change", found.name, given);
    send(response, 200, found);
  } else if (route === "usage") send(response, 200, { data: usage(url.searchParams, state) });
  else if (route === "audit") {
    const before = Number(url.searchParams.get("before") ?? Infinity);
    send(response, 200, { data: state.audit.filter((entry) => entry.id < before || before === Infinity).slice(0, Number(url.searchParams.get("limit") ?? 100)) });
  } else if (route === "settings" && request.method === "GET") send(response, 200, state.settings);
  else if (route === "settings") {
    if (given.max_batch_size > 1000) return fail(response, 400, "`max_batch_size`: expected a number from 1 to 1000");
    Object.assign(state.settings, given);
    note("settings.change", "engine", given);
    send(response, 200, state.settings);
  } else fail(response, 404, "There is nothing here.");
}

const emptyKey = { models: null, expires: null, revoked: null, last_used: null, requests_per_minute: null, tokens_per_minute: null, tokens_per_month: null, money_per_month: null, month: { requests: 0, prompt_tokens: 0, completion_tokens: 0, money: 0 } };

function demoKeys() {
  const created = 1_760_000_000;
  return [
    { ...emptyKey, id: "key_1", name: "operations", scopes: ["admin"], created, last_used: created + 4_000_000 },
    { ...emptyKey, id: "key_2", name: "Support assistant", scopes: ["chat", "tokenize", "models"], models: ["ernie-4.5-21b"], created, last_used: created + 4_100_000, requests_per_minute: 120, tokens_per_minute: 60_000, tokens_per_month: 40_000_000, money_per_month: 250, month: { requests: 48_120, prompt_tokens: 21_400_000, completion_tokens: 9_900_000, money: 121.4 } },
    { ...emptyKey, id: "key_3", name: "Search <b>index</b>", scopes: ["embeddings", "tokenize"], created, tokens_per_month: 5_000_000, month: { requests: 9_001, prompt_tokens: 4_700_000, completion_tokens: 0, money: 9.4 }, last_used: created + 3_900_000 },
    { ...emptyKey, id: "key_4", name: "Pilot, spring", scopes: ["chat"], created, expires: created + 86_400, revoked: null },
    { ...emptyKey, id: "key_5", name: "Old notebook", scopes: ["chat", "completions"], created: created - 10_000_000, revoked: created },
  ];
}

function demoAudit() {
  return Array.from({ length: 70 }, (_, index) => ({ id: 70 - index, at: 1_760_000_000 - index * 40_000, actor: "operations", action: ["key.create", "key.change", "settings.change"][index % 3], target: "Support assistant", detail: index % 2 ? { tokens_per_month: 40_000_000 } : null }));
}

function usage(query, state) {
  const row = (more, size) => ({ day: null, key_id: null, key_name: null, model: null, requests: Math.round(size * 40), prompt_tokens: Math.round(size * 30_000), completion_tokens: Math.round(size * 12_000), seconds: size * 300, joules: size * 9000, money: size * 0.31, ...more });
  if (query.get("by") === "key") return state.keys.slice(1, 4).map((key, index) => row({ key_id: key.id, key_name: key.name }, 300 / (index + 1)));
  if (query.get("by") === "model") return [row({ model: "ernie-4.5-21b" }, 480), row({ model: "ernie-4.5-0.3b" }, 70)];
  const days = Math.round((Date.parse(query.get("to")) - Date.parse(query.get("from"))) / 86_400_000) + 1;
  return Array.from({ length: days }, (_, index) => row({ day: new Date(Date.parse(query.get("from")) + index * 86_400_000).toISOString().slice(0, 10) }, 10 + 8 * Math.sin(index * 0.9) + index * 0.2));
}

// Alone: to look at the page.
if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const server = await start(Number(process.argv[2] ?? 0));
  server.state.past = 280;
  console.log(`${server.url}, administration with ${ADMIN_KEY}`);
}
