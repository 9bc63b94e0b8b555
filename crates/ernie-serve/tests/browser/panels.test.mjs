// Live state and administration, against the stand-in.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { close, open } from "./harness.mjs";
import { ADMIN_KEY, CHAT_KEY, start } from "./mock.mjs";

let server;
before(async () => (server = await start()));
after(async () => {
  await close();
  await server.stop();
});

async function signIn(page, key = ADMIN_KEY) {
  await page.fill("#admin-key", key);
  await page.press("#admin-key", "Enter");
}

test("numbers, curves and maps follow the events, and a lost connection comes back", async (context) => {
  const own = await start();
  context.after(() => own.stop());
  own.state.past = 120;
  const page = await open(`${own.url}/#live`);
  await page.waitForFunction(() => document.querySelectorAll(".tile").length === 6);
  assert.match(await page.locator(".tiles").innerText(), /batch up to 16, dynamic/);
  assert.ok((await page.locator(".chart .line").first().getAttribute("d")).length > 200);
  assert.equal(await page.locator(".status").innerText(), "connected");
  const map = page.locator(".heat canvas").first();
  await map.scrollIntoViewIfNeeded();
  const box = await map.boundingBox();
  await page.mouse.move(box.x + box.width * 0.5, box.y + 3);
  assert.match(await page.locator(".heat-told").first().innerText(), /^Layer 1, expert 32: \d/);
  await map.focus();
  await page.keyboard.press("ArrowDown");
  assert.match(await page.locator(".heat-told").first().innerText(), /^Layer 2, expert/);
  assert.match(await page.locator(".heat canvas").nth(1).getAttribute("aria-label"), /Layer 0: \d+% open/);
  own.state.live.forEach((response) => response.socket.destroy());
  await page.getByText(/connection lost/).waitFor();
  await page.waitForFunction(() => document.querySelector(".status").innerText === "connected");
  // Who does not look costs nothing.
  await page.goto(`${own.url}/#chat`);
  for (let waited = 0; own.state.live.size > 0; waited += 50) {
    assert.ok(waited < 10_000);
    await page.waitForTimeout(50);
  }
});

test("signing in needs a key with the scope, which stays in the tab", async () => {
  const page = await open(`${server.url}/#admin`);
  await page.waitForSelector("#admin-key");
  assert.equal(await page.locator(".trouble").count(), 0);
  await signIn(page, "sk-wrong");
  await page.getByText("needs a valid API key").waitFor();
  await signIn(page, CHAT_KEY);
  await page.getByText("does not have the scope admin").waitFor();
  await signIn(page);
  await page.getByText("Signed in as operations").waitFor();
  const places = await page.evaluate((key) => [JSON.stringify(localStorage).includes(key), JSON.stringify(sessionStorage).includes(key)], ADMIN_KEY);
  assert.deepEqual(places, [false, true]);
  await page.reload();
  await page.getByText("Signed in as operations").waitFor();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.waitForSelector("#admin-key");
  assert.equal(await page.evaluate((key) => JSON.stringify(sessionStorage).includes(key), ADMIN_KEY), false);
});

test("keys are made, shown once, changed and revoked", async () => {
  const page = await open(`${server.url}/#admin`);
  await signIn(page);
  const card = (name) => page.locator(".key", { hasText: name });
  assert.match(await card("Support assistant").innerText(), /31\.3M of 40M · 78%/);
  assert.equal(await page.locator(".key b").count(), 0);
  await page.getByRole("button", { name: "New key" }).click();
  await page.getByLabel("Name").fill("Reports");
  for (const box of await page.locator("dialog input[type=checkbox]").all()) await box.uncheck();
  await page.locator("dialog button[type=submit]").click();
  await page.getByText("expected at least one scope").waitFor();
  await page.getByLabel("embeddings").check();
  await page.getByRole("spinbutton", { name: "Tokens per month" }).fill("500000");
  await page.locator("dialog button[type=submit]").click();
  const secret = await page.locator(".secret").inputValue();
  assert.match(secret, /^sk-/);
  await page.locator("dialog").getByRole("button", { name: "Copy" }).click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), secret);
  await page.getByRole("button", { name: "Done" }).click();
  await card("Reports").waitFor();
  assert.ok(!(await page.content()).includes(secret));
  const made = server.state.keys.at(-1);
  assert.deepEqual([made.scopes, made.tokens_per_month, made.money_per_month, made.models], [["embeddings"], 500000, null, null]);
  await card("Reports").getByRole("button", { name: "Edit" }).click();
  await page.getByRole("spinbutton", { name: "Tokens per month" }).fill("");
  await page.getByRole("spinbutton", { name: "Money per month" }).fill("12.5");
  await page.locator("dialog button[type=submit]").click();
  await page.getByText("€0.00 of €12.50").waitFor();
  assert.deepEqual([made.tokens_per_month, made.money_per_month, made.name], [null, 12.5, "Reports"]);
  // Another name, and nothing else.
  await card("Reports").getByRole("button", { name: "Edit" }).click();
  const renaming = page.waitForRequest((request) => request.method() === "PATCH");
  await page.getByLabel("Name").fill("Monthly figures");
  await page.locator("dialog button[type=submit]").click();
  assert.deepEqual((await renaming).postDataJSON(), { name: "Monthly figures" });
  await card("Monthly figures").waitFor();
  assert.equal(await card("Reports").count(), 0);
  await card("Monthly figures").getByRole("button", { name: "Revoke" }).click();
  await page.locator("dialog .danger").click();
  await card("Monthly figures").getByText("revoked").waitFor();
  assert.equal(await card("Monthly figures").getByRole("button").count(), 0);
});

test("a dialog ends with its view, a notice by itself", async () => {
  const page = await open(`${server.url}/#admin`);
  await signIn(page);
  await page.locator(".key").first().waitFor();
  for (const button of ["New key", "Edit", "Revoke"]) {
    await page.getByRole("button", { name: button }).first().click();
    await page.locator("dialog[open]").waitFor();
    await page.evaluate(() => (location.hash = "live"));
    await page.waitForFunction(() => document.querySelector("dialog") === null);
    await page.waitForSelector(".tile");
    await page.goBack();
    await page.locator(".key").first().waitFor();
  }
  await page.click("#tab-settings");
  await page.getByRole("button", { name: "Apply" }).click();
  await page.locator(".notice").waitFor();
  await page.locator(".notice").waitFor({ state: "detached", timeout: 8000 });
});

test("usage, the audit log and settings", async () => {
  const page = await open(`${server.url}/#admin`);
  await signIn(page);
  await page.click("#tab-usage");
  await page.waitForSelector(".bars");
  assert.equal(await page.locator(".bar").count(), 30);
  await page.getByText("7 days").click();
  await page.waitForFunction(() => document.querySelectorAll(".bar").length === 7);
  await page.locator(".segments label", { hasText: "Money" }).click();
  await page.waitForFunction(() => document.querySelector(".bar").title.includes("€"));
  assert.match(await page.locator(".ranking").first().innerText(), /Support assistant/);
  await page.keyboard.press("Escape");
  await page.click("#tab-audit");
  await page.waitForFunction(() => document.querySelectorAll("tbody tr").length === 50);
  await page.getByRole("button", { name: "Earlier entries" }).click();
  await page.waitForFunction(() => document.querySelectorAll("tbody tr").length >= 70);
  await page.click("#tab-settings");
  await page.getByLabel("Dynamic batching").uncheck();
  await page.getByLabel("Largest batch").fill("4");
  await page.getByRole("button", { name: "Apply" }).click();
  const notice = page.locator(".notice");
  await notice.getByText("The settings are in force").waitFor();
  await notice.click();
  assert.equal(await notice.count(), 0);
  assert.deepEqual(server.state.settings, { dynamic_batching: false, max_batch_size: 4 });
  await page.getByLabel("Largest batch").fill("4000");
  await page.getByRole("button", { name: "Apply" }).click();
  await page.getByText("from 1 to 1000").waitFor();
});
