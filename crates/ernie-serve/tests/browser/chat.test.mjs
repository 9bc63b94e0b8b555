// The conversation, against the stand-in.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { answer, answered, ask, close, open, overflows } from "./harness.mjs";
import { CHAT_KEY, start } from "./mock.mjs";

let server;
before(async () => (server = await start()));
after(async () => {
  await close();
  await server.stop();
});

const stored = (page) => page.evaluate(() => Object.keys(localStorage).filter((key) => key.startsWith("ernie.chat.")).map((key) => JSON.parse(localStorage[key])));

test("an answer streams, is kept, and survives a reload", async () => {
  const page = await open(server.url);
  await ask(page, "long one");
  await page.waitForFunction(() => document.querySelector(".message.assistant .message-body")?.innerText.includes("word5"));
  const early = await answer(page).innerText();
  assert.ok(!early.includes("word399"));
  const text = await answered(page);
  assert.ok(text.endsWith("word399"));
  assert.match(await answer(page).locator(".facts").innerText(), /400 tokens · .*tokens\/s/);
  await page.reload();
  assert.equal(await answered(page), text);
  assert.equal((await page.locator(".entry").allInnerTexts()).join(), "long one");
  assert.deepEqual([page.troubles, page.foreign], [[], []]);
});

test("settings and the system prompt are sent", async () => {
  const page = await open(server.url);
  await page.getByLabel("System prompt").fill("Be short.");
  const set = async (name, value) => page.locator(`#sampling-${name}`).fill(value);
  await set("temperature", "0.3");
  await set("top_p", "0.5");
  await set("top_k", "7");
  await set("min_p", "0.02");
  await set("max_tokens", "33");
  await set("seed", "11");
  await page.getByText("Penalties").click();
  await set("presence_penalty", "0.5");
  await set("frequency_penalty", "-0.5");
  await set("repetition_penalty", "1.1");
  await ask(page, "hello");
  await answered(page);
  const { messages, ...rest } = server.state.requests.at(-1);
  assert.deepEqual(messages, [{ role: "system", content: "Be short." }, { role: "user", content: "hello" }]);
  assert.deepEqual(rest, {
    temperature: 0.3, top_p: 0.5, top_k: 7, min_p: 0.02, max_tokens: 33, seed: 11, presence_penalty: 0.5, frequency_penalty: -0.5, repetition_penalty: 1.1,
    logprobs: true, top_logprobs: 5, stream: true, stream_options: { include_usage: true },
  });
  // What is out of range is marked, and the last good value stays.
  await set("temperature", "9");
  assert.equal(await page.locator("#sampling-temperature").getAttribute("aria-invalid"), "");
  await page.reload();
  assert.equal(await page.locator("#sampling-temperature").inputValue(), "0.3");
  await page.getByRole("button", { name: "Reset to defaults" }).click();
  assert.equal(await page.locator("#sampling-max_tokens").inputValue(), "");
  await page.getByLabel("Token probabilities with each answer").uncheck();
  await ask(page, "again");
  await answered(page);
  const last = server.state.requests.at(-1);
  assert.ok(!("logprobs" in last) && !("max_tokens" in last) && !("seed" in last));
  assert.equal(last.messages.length, 4);
});

test("stopping keeps what has come and ends the request", async () => {
  const page = await open(server.url);
  await ask(page, "long one to stop");
  await page.waitForFunction(() => document.querySelector(".message.assistant .message-body")?.innerText.includes("word3"));
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  const text = await answered(page);
  assert.ok(text.includes("word3") && !text.includes("word399"));
  assert.match(await answer(page).innerText(), /stopped/);
  await page.waitForTimeout(100);
  assert.equal(server.state.closed, true);
  // With the keyboard, from the field.
  await ask(page, "long again");
  await page.waitForFunction(() => document.querySelectorAll(".message.assistant .message-body")[1]?.innerText.includes("word3"));
  await page.keyboard.press("Escape");
  assert.ok(!(await answered(page)).includes("word399"));
  assert.equal(await page.locator(".send.stop").isVisible(), false);
  assert.equal(await page.locator(".trouble").count(), 0);
});

test("regenerating asks again, editing changes the past", async () => {
  const page = await open(server.url);
  await ask(page, "first");
  const before = await answered(page);
  await answer(page).getByRole("button", { name: "Regenerate" }).click();
  await page.waitForFunction((before) => !document.querySelector(".writing") && document.querySelector(".message.assistant .message-body").innerText !== before, before);
  assert.equal(await page.locator(".message").count(), 2);
  await ask(page, "second");
  await answered(page);
  assert.equal(await page.locator(".message").count(), 4);
  const question = page.locator(".message.user").first();
  await question.hover();
  await question.getByRole("button", { name: "Edit" }).click();
  await question.locator("textarea").fill("changed\nin two lines");
  await question.locator("textarea").press("Enter");
  await answered(page);
  assert.equal(await page.locator(".message").count(), 2);
  assert.deepEqual(server.state.requests.at(-1).messages, [{ role: "user", content: "changed\nin two lines" }]);
  const [conversation] = await stored(page);
  assert.equal(conversation.messages.length, 2);
  // Leaving an edit changes nothing.
  await question.hover();
  await question.getByRole("button", { name: "Edit" }).click();
  await question.locator("textarea").fill("never sent");
  await question.locator("textarea").press("Escape");
  assert.match(await question.innerText(), /changed/);
});

test("when the server dies the partial answer stays, with an error and a way to retry", async (context) => {
  const page = await open(server.url);
  for (const [question, said] of [["die in the middle", /connection to the server was lost|cut off/], ["broken stream", /The server is stopping|server is stopping/], ["refuse this", /maximum context length/]]) {
    await ask(page, question);
    await answered(page);
    assert.match(await answer(page).locator(".trouble").innerText(), said);
    if (question !== "refuse this") assert.match(await answer(page).locator(".message-body").innerText(), /^Answer/);
  }
  await page.reload();
  assert.match(await answer(page).locator(".trouble").innerText(), /maximum context length/);
  const asked = server.state.requests.length;
  await answer(page).getByRole("button", { name: "Retry" }).click();
  await answered(page);
  assert.equal(server.state.requests.length, asked + 1);
  assert.equal(await page.locator(".message.user").count(), 3);
  // Nobody there at all.
  const other = await start();
  const lone = await open(other.url);
  await other.stop();
  await ask(lone, "anybody?");
  await answered(lone);
  assert.match(await answer(lone).locator(".trouble").innerText(), /cannot be reached/);
  const again = await start(other.port);
  context.after(() => again.stop());
  await answer(lone).getByRole("button", { name: "Retry" }).click();
  await lone.waitForFunction(() => !document.querySelector(".trouble") && !document.querySelector(".writing"));
  assert.match(await answered(lone), /anybody/);
});

test("probabilities of tokens are shown on hover and by keyboard", async () => {
  const page = await open(server.url);
  await ask(page, "tell me");
  const text = await answered(page);
  await answer(page).getByRole("button", { name: "Token probabilities" }).click();
  const tokens = page.locator(".token");
  assert.equal((await tokens.allInnerTexts()).join("").trim(), text.trim());
  await tokens.nth(1).hover();
  const rows = await page.locator(".token-card tr").allInnerTexts();
  assert.equal(rows.length, 3);
  assert.match(rows[0], /80%/);
  assert.equal(await page.locator(".token-card .chosen").count(), 1);
  await page.mouse.move(0, 0);
  await tokens.first().focus();
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.evaluate(() => document.activeElement.dataset.index), "1");
  assert.equal(await page.locator(".token-card").isVisible(), true);
  await answer(page).getByRole("button", { name: "Token probabilities" }).click();
  assert.equal(await page.locator(".token").count(), 0);
  assert.equal(await answered(page), text);
});

test("conversations are listed, renamed, deleted, exported and imported", async () => {
  const page = await open(server.url);
  for (const question of ["about birds", "about bees"]) {
    await page.locator(".sidebar .new").click();
    await ask(page, question);
    await answered(page);
  }
  assert.deepEqual(await page.locator(".entry").allInnerTexts(), ["about bees", "about birds"]);
  await page.locator(".entry", { hasText: "birds" }).click();
  assert.match(await page.locator(".message.user").innerText(), /about birds/);
  const menu = async (name, action) => {
    const item = page.locator(".entries li", { hasText: name });
    await item.hover();
    await item.getByRole("button", { name: "More" }).click();
    await item.getByText(action).click();
  };
  await menu("about birds", "Rename");
  await page.locator("dialog input").fill("Feathers <i>");
  await page.keyboard.press("Enter");
  await page.locator(".entry", { hasText: "Feathers <i>" }).waitFor();
  const download = async (act) => {
    const [file] = await Promise.all([page.waitForEvent("download"), act()]);
    return { name: file.suggestedFilename(), text: await readFile(await file.path(), "utf8"), path: await file.path() };
  };
  const markdown = await download(() => menu("Feathers", "Export as Markdown"));
  assert.equal(markdown.name, "Feathers-i.md");
  assert.match(markdown.text, /^# Feathers <i>\n\n## You\n\nabout birds\n\n## Assistant\n\nAnswer/);
  const one = await download(() => menu("Feathers", "Export as JSON"));
  assert.equal(JSON.parse(one.text).conversations.length, 1);
  const all = await download(() => page.getByText("Export all").click());
  await menu("about bees", "Delete");
  await page.locator("dialog .danger").click();
  await page.waitForFunction(() => document.querySelectorAll(".entry").length === 1);
  await page.locator("input[type=file]").setInputFiles({ name: "all.json", mimeType: "application/json", buffer: Buffer.from(all.text) });
  await page.waitForFunction(() => document.querySelectorAll(".entry").length === 3);
  await page.locator("input[type=file]").setInputFiles({ name: "bad.json", mimeType: "application/json", buffer: Buffer.from("{\"format\": 1}") });
  await page.getByText("does not hold conversations").waitFor();
  // Whatever a file says, it is only text.
  const hostile = { format: "ernie-conversations", version: 1, conversations: [{ id: "../x\"><img src=x onerror=pwned=1>", title: "<img src=x onerror='window.pwned=1'>", messages: [{ role: "system", content: 1 }, { role: "assistant", content: "<img src=x onerror='window.pwned=1'>" }] }] };
  await page.locator("input[type=file]").setInputFiles({ name: "x.json", mimeType: "application/json", buffer: Buffer.from(JSON.stringify(hostile)) });
  await page.locator(".entry", { hasText: "<img" }).click();
  assert.match(await answered(page), /<img/);
  assert.equal(await page.evaluate(() => window.pwned), undefined);
});

test("a key is asked for when one is needed, and kept in this tab only", async () => {
  const page = await open(server.url);
  await ask(page, "locked room");
  await page.locator("dialog input").fill(CHAT_KEY);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => !document.querySelector(".trouble") && !document.querySelector(".writing"));
  assert.match(await answered(page), /locked room/);
  const places = await page.evaluate((key) => [JSON.stringify(localStorage).includes(key), JSON.stringify(sessionStorage).includes(key), location.href.includes(key)], CHAT_KEY);
  assert.deepEqual(places, [false, true, false]);
});

test("everything works with the keyboard alone", async () => {
  const page = await open(server.url);
  assert.equal(await page.evaluate(() => document.activeElement.id), "question");
  await page.keyboard.type("by hand");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("second line");
  await page.keyboard.press("Enter");
  await answered(page);
  assert.equal(server.state.requests.at(-1).messages.at(-1).content, "by hand\nsecond line");
  // From the beginning of the page: skip link, then views, in the order in which they are seen; focus is visible.
  await page.keyboard.press("Escape");
  await page.evaluate(() => {
    document.activeElement?.blur();
    window.getSelection().removeAllRanges();
  });
  await page.reload();
  await page.evaluate(() => document.getElementById("skip").focus());
  const order = [];
  for (let step = 0; step < 60; step += 1) {
    const seen = await page.evaluate(() => {
      const style = getComputedStyle(document.activeElement);
      const outline = style.outlineStyle !== "none" || document.activeElement.closest(".composer-box:focus-within") !== null;
      if (document.activeElement === document.body) return null;
      return { name: document.activeElement.getAttribute("aria-label") || document.activeElement.innerText || document.activeElement.id, outline };
    });
    // The end of the page.
    if (seen === null) break;
    order.push(seen.name.trim());
    assert.ok(seen.outline || seen.name === "", `no visible focus on ${seen.name}`);
    await page.keyboard.press("Tab");
  }
  const places = ["Skip to content", "Chat", "Live", "Admin", "New chat", "Import", "Write a message", "Close the settings"].map((name) => order.findIndex((one) => one === name));
  assert.ok(places.every((place, index) => place >= 0 && (index === 0 || place > places[index - 1])), JSON.stringify([places, order]));
  // Letters, when no field has the focus.
  await page.evaluate(() => document.activeElement?.blur());
  await page.keyboard.press("?");
  assert.equal(await page.locator("dialog").isVisible(), true);
  await page.keyboard.press("Escape");
  await page.keyboard.press("2");
  await page.waitForSelector("#view-live:not([hidden])");
  await page.keyboard.press("1");
  await page.waitForSelector("#view-chat:not([hidden])");
  await page.keyboard.press("Escape");
  await page.keyboard.press("n");
  assert.equal(await page.locator(".welcome").isVisible(), true);
  // An Enter that ends the input of a word in another script sends nothing.
  const asked = server.state.requests.length;
  await page.fill("#question", "ni");
  await page.evaluate(() => document.getElementById("question").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true })));
  await page.waitForTimeout(100);
  assert.equal(server.state.requests.length, asked);
});

test("dark and light follow the system until somebody chooses", async () => {
  const background = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await open(server.url, { dark: true });
  const [black, white] = [await background(dark), await background(await open(server.url))];
  assert.notEqual(black, white);
  await dark.getByRole("button", { name: "Switch between light and dark" }).click();
  assert.equal(await background(dark), white);
  await dark.reload();
  assert.equal(await background(dark), white);
  await dark.emulateMedia({ colorScheme: "light" });
  assert.equal(await background(dark), white);
});

test("Chinese is chosen by the browser's wish and can be changed at any moment", async () => {
  const page = await open(server.url, { locale: "zh-CN" });
  assert.equal(await page.getAttribute("html", "lang"), "zh-CN");
  assert.equal(await page.getAttribute("#question", "placeholder"), "输入消息");
  await ask(page, "long 你好");
  await page.waitForFunction(() => document.querySelector(".message.assistant .message-body")?.innerText.includes("word3"));
  await page.locator(".language").click();
  assert.equal(await page.getAttribute("#question", "placeholder"), "Write a message");
  const text = await answered(page);
  assert.ok(text.endsWith("word399"));
  await page.reload();
  assert.equal(await page.getAttribute("html", "lang"), "en");
  for (const path of ["live", "admin"]) {
    await page.goto(`${server.url}/#${path}`);
    await page.locator(".language").click();
  }
  assert.match(await page.title(), /Admin|管理/);
});

test("nothing is wider than a narrow screen", async () => {
  const page = await open(server.url, { width: 360, height: 700, touch: true });
  for (const question of ["markdown", "hostile", "refuse this"]) {
    await ask(page, question);
    await answered(page);
    assert.equal(await overflows(page), 0, question);
    assert.ok(await page.evaluate(() => document.querySelector(".scroller").scrollWidth <= document.querySelector(".scroller").clientWidth), question);
  }
  await page.locator(".list-button").click();
  assert.equal(await page.locator(".sidebar .new").isVisible(), true);
  await page.keyboard.press("Escape");
  assert.equal(await page.locator(".sidebar .new").isVisible(), false);
  await page.getByRole("button", { name: "Settings" }).first().click();
  assert.equal(await overflows(page), 0);
  await page.getByRole("button", { name: "Close the settings" }).click();
  for (const path of ["live", "admin"]) {
    await page.goto(`${server.url}/#${path}`);
    await page.waitForTimeout(300);
    assert.equal(await overflows(page), 0, path);
  }
});
