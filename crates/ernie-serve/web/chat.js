// The conversation: questions, answers as they come, and the list of what was said before.
import { events, keys, request, RequestError } from "./api.js";
import { ask, notice } from "./dialog.js";
import { h, iconButton, replace } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { messageView, report } from "./message.js";
import { panel, parameters } from "./sampling.js";
import { load, save } from "./storage.js";
import * as store from "./store.js";
import { sidebar } from "./sidebar.js";

const EXAMPLES = ["chat.example_story", "chat.example_question", "chat.example_coffee"];
/** How often an answer is kept while it comes. */
const SAVE_SECONDS = 2;

export function chatView() {
  let conversation = store.find(load("open") ?? "") ?? store.create();
  let views = [];
  /** The answer that is being written. */
  let running = null;
  /** Conversations as they were left, with the probabilities of their tokens. */
  const opened = new Map([[conversation.id, conversation]]);

  const log = h("div", { class: "log", role: "log", "aria-live": "polite", "aria-relevant": "additions", tLabel: "chat.log", tabindex: "-1" });
  const toEnd = iconButton("down", "chat.to_end", () => scrollToEnd("smooth"), { class: "to-end", hidden: true });
  const scroller = h("div", { class: "scroller", on: { scroll: () => (toEnd.hidden = isAtEnd()) } }, log);
  const input = h("textarea", { id: "question", rows: "1", tPlaceholder: "chat.placeholder", tLabel: "chat.placeholder", enterkeyhint: "send" });
  const send = iconButton("send", "chat.send", submit, { class: "send primary" });
  const stop = iconButton("stop", "chat.stop", halt, { class: "send stop", hidden: true });
  const hint = h("p", { class: "hint muted small", t: "chat.hint" });
  const composer = h("form", { class: "composer", on: { submit: (event) => { event.preventDefault(); submit(); } } }, h("div", { class: "composer-box" }, input, send, stop), hint);

  const list = sidebar({
    open, create,
    isOpen: (id) => id === conversation.id,
    renamed(id, title) {
      if (opened.has(id)) opened.get(id).title = title;
      showTitle();
    },
    removed(id) {
      opened.delete(id);
      if (id === conversation.id) create();
    },
  });
  const settings = panel({
    getSystem: () => conversation.system,
    setSystem(text) {
      conversation.system = text;
      keep(conversation);
    },
    close: () => showSettings(false),
  });
  const settingsButton = iconButton("sliders", "sampling.title", () => showSettings(settings.element.hidden), { "aria-expanded": "false" });
  const title = h("h1", { class: "conversation-title" });
  const listButton = iconButton("menu", "chat.conversations", () => list.toggle(), { class: "list-button" });
  const head = h("header", { class: "view-head" }, listButton, title, iconButton("plus", "chat.new", create, { class: "new-button" }), settingsButton);
  const element = h("section", { class: "chat", id: "view-chat", tLabel: "nav.chat" }, list.element,
    h("div", { class: "conversation" }, head, scroller, toEnd, composer), settings.element);

  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    // The Enter that ends the input of a Chinese word sends nothing.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  });
  window.addEventListener("storage", (event) => {
    // Another tab has written.
    if (!event.key?.startsWith("ernie.chat.")) return;
    const id = event.key.slice("ernie.chat.".length);
    if (id !== conversation.id) opened.delete(id);
    list.show();
  });
  onLanguage(() => {
    views.forEach((view) => view.finish());
    showTitle();
    list.show();
    if (conversation.messages.length === 0) showMessages();
  });

  showSettings(window.innerWidth >= 1200 && load("settings-open") !== false, false);
  showMessages();
  list.show();

  function keep(one) {
    if (!store.keep(one)) notice(t("chat.not_kept"), "warning");
    list.show();
    showTitle();
  }

  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, 220)}px`;
  }

  function showTitle() {
    title.textContent = store.titleOf(conversation);
  }

  function showSettings(visible, remember = true) {
    settings.element.hidden = !visible;
    settingsButton.setAttribute("aria-expanded", String(visible));
    if (visible) settings.show();
    if (remember) {
      save("settings-open", visible);
      if (!visible) settingsButton.focus();
    }
  }

  const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

  function scrollToEnd(behavior = "instant") {
    scroller.scrollTo({ top: scroller.scrollHeight, behavior });
  }

  function showMessages() {
    showTitle();
    settings.show();
    if (conversation.messages.length === 0) {
      views = [];
      replace(log, welcome());
    } else {
      views = conversation.messages.map(viewOf);
      replace(log, views.map((view) => view.element));
    }
    toEnd.hidden = true;
    requestAnimationFrame(() => scrollToEnd());
  }

  function welcome() {
    const example = (key) => h("button", { type: "button", class: "example", t: key, on: { click: () => { input.value = t(key); grow(); submit(); } } });
    return h("div", { class: "welcome" }, h("h2", { t: "chat.welcome" }), h("p", { class: "muted", t: "chat.welcome_note" }), h("div", { class: "examples" }, EXAMPLES.map(example)));
  }

  function viewOf(message, index) {
    const again = () => regenerate(index);
    if (message.role === "user") return messageView(message, { edit: (text) => edit(index, text) });
    return messageView(message, { regenerate: again, retry: again });
  }

  function open(id) {
    const found = opened.get(id) ?? store.find(id);
    if (!found || found.id === conversation.id) return;
    opened.set(id, found);
    halt();
    conversation = found;
    save("open", id);
    showMessages();
    list.show();
    input.focus();
  }

  function create() {
    halt();
    conversation = store.create();
    opened.set(conversation.id, conversation);
    save("open", null);
    showMessages();
    list.show();
    input.focus();
  }

  function submit() {
    const text = input.value.trim();
    if (!text || running) return;
    input.value = "";
    grow();
    conversation.messages.push({ role: "user", content: text });
    save("open", conversation.id);
    answer();
  }

  function edit(index, text) {
    halt();
    conversation.messages.length = index;
    conversation.messages.push({ role: "user", content: text });
    answer();
    input.focus();
  }

  function regenerate(index) {
    halt();
    conversation.messages.length = index;
    answer();
    input.focus();
  }

  function halt() {
    running?.abort.abort();
  }

  /** Asks for the next turn and shows it while it comes. What has come stays, whatever happens. */
  async function answer() {
    const own = conversation;
    const message = { role: "assistant", content: "" };
    const body = {
      messages: [...(own.system.trim() ? [{ role: "system", content: own.system }] : []), ...own.messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }))],
      ...parameters(), stream: true, stream_options: { include_usage: true },
    };
    own.messages.push(message);
    keep(own);
    showMessages();
    const view = views.at(-1);
    const abort = new AbortController();
    const mine = { abort };
    running = mine;
    showRunning(true);
    view.writing = true;
    view.update();
    let drawn = 0;
    const draw = () => {
      drawn ||= requestAnimationFrame(() => {
        drawn = 0;
        const follow = isAtEnd();
        view.update();
        if (follow) scrollToEnd();
      });
    };
    const began = performance.now();
    const since = () => (performance.now() - began) / 1000;
    try {
      let done = false;
      let saved = 0;
      for await (const data of events(await request("/v1/chat/completions", { method: "POST", body, signal: abort.signal }))) {
        if (data === "[DONE]") {
          done = true;
          break;
        }
        const event = parse(data);
        if (event.error) throw new RequestError(500, String(event.error.message ?? t("error.unreadable")));
        const choice = event.choices?.[0];
        if (typeof event.model === "string") message.model = event.model;
        if (Number.isFinite(event.usage?.completion_tokens)) message.tokens = event.usage.completion_tokens;
        if (!choice) continue;
        if (typeof choice.delta?.content === "string" && choice.delta.content !== "") {
          message.first ??= since();
          message.content += choice.delta.content;
        }
        report(message, choice.logprobs?.content);
        if (typeof choice.finish_reason === "string") message.finish = choice.finish_reason;
        // Whoever closes the page in the middle finds what had come.
        if (since() > saved + SAVE_SECONDS) {
          saved = since();
          store.keep(own);
        }
        draw();
      }
      // A server that dies closes the connection as one that is done does, but does not say so.
      if (!done) throw new RequestError(0, t("error.cut_off"));
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error instanceof RequestError ? explain(error) : t("error.unexpected", { message: String(error?.message ?? error) });
      if (error.status === 401) askForKey();
    } finally {
      message.seconds = since();
      cancelAnimationFrame(drawn);
      view.writing = false;
      const follow = isAtEnd();
      view.update();
      view.finish();
      if (running === mine) {
        running = null;
        showRunning(false);
      }
      // It may have been thrown away meanwhile.
      if (own.messages.at(-1) === message && (own === conversation || store.find(own.id))) keep(own);
      if (follow && own === conversation) scrollToEnd();
    }
  }

  function explain(error) {
    if (error.status === 401) return t("error.key");
    if (error.status === 429) return t("error.busy", { message: error.message });
    return error.message;
  }

  function parse(data) {
    try {
      const value = JSON.parse(data);
      if (typeof value === "object" && value !== null) return value;
    } catch {
      // As below.
    }
    throw new RequestError(0, t("error.unreadable"));
  }

  function showRunning(is) {
    const focused = document.activeElement === send || document.activeElement === stop;
    send.hidden = is;
    stop.hidden = !is;
    if (focused) (is ? stop : input).focus();
  }

  async function askForKey() {
    const key = await ask("key.title", "key.label", "", { type: "password", action: "key.use", note: "key.note" });
    if (key?.trim()) {
      keys.set("chat", key.trim());
      settings.show();
      if (conversation.messages.at(-1)?.error) regenerate(conversation.messages.length - 1);
    }
  }

  return {
    element,
    show: () => input.focus(),
    hide() {},
    /** Whether there was something to put away. */
    escape() {
      if (list.close()) return true;
      if (running) {
        halt();
        return true;
      }
      if (!settings.element.hidden && window.innerWidth < 1200) {
        showSettings(false);
        return true;
      }
      return false;
    },
    create, focus: () => input.focus(),
    toggleSettings: () => showSettings(settings.element.hidden),
  };
}
