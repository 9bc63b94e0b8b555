// The page with the real server and the built-in model. Needs ERNIE_BIN, the path of the program.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { after, test } from "node:test";
import { answer, answered, ask, close, open } from "./harness.mjs";

const program = process.env.ERNIE_BIN;
const running = new Set();

async function serve(port = "0") {
  const child = spawn(program, ["serve", "--port", port, "--model-name", "nano"], { stdio: ["ignore", "pipe", "pipe"] });
  running.add(child);
  child.on("exit", () => running.delete(child));
  let said = "";
  const url = await new Promise((resolve, reject) => {
    const read = (bytes) => {
      said += bytes;
      const found = /http:\/\/127\.0\.0\.1:\d+/.exec(said);
      if (found) resolve(found[0]);
    };
    child.stdout.on("data", read);
    child.stderr.on("data", read);
    child.on("exit", (code) => reject(new Error(`ended with ${code}: ${said}`)));
  });
  return { url, child };
}

after(async () => {
  await close();
  running.forEach((child) => child.kill());
});

test("a conversation, its probabilities, live state and settings", { skip: !program && "ERNIE_BIN is not set" }, async () => {
  const { url } = await serve();
  const page = await open(url);
  await page.getByText("nano").first().waitFor();
  await page.locator("#sampling-seed").fill("5");
  await page.locator("#sampling-max_tokens").fill("40");
  await ask(page, "What do birds eat?");
  const text = await answered(page);
  assert.ok(text.length > 5, text);
  await answer(page).getByRole("button", { name: "Regenerate" }).click();
  await page.waitForTimeout(100);
  // The same seed, the same answer.
  assert.equal(await answered(page), text);
  await answer(page).getByRole("button", { name: "Token probabilities" }).click();
  assert.equal((await page.locator(".token").allTextContents()).join("").trim(), text.trim());
  await page.locator(".token").nth(2).hover();
  assert.ok((await page.locator(".token-card tr").count()) >= 5);
  await page.goto(`${url}/#live`);
  await page.waitForFunction(() => document.querySelectorAll(".tile").length === 6);
  await page.waitForFunction(() => /\/s/.test(document.querySelector(".tile strong")?.innerText ?? ""));
  assert.equal(await page.locator(".heat:not([hidden])").count(), 1);
  assert.match(await page.locator(".heat canvas").first().getAttribute("aria-label"), /Layer 5, expert \d/);
  assert.deepEqual([page.troubles, page.foreign], [[], []]);
});

test("a server that is killed leaves the partial answer, and one that comes back goes on", { skip: !program && "ERNIE_BIN is not set" }, async () => {
  const { url, child } = await serve();
  const page = await open(url);
  await page.evaluate(() => (window.mark = true));
  for (let attempt = 0; ; attempt += 1) {
    assert.ok(attempt < 5, "the answer was always complete before the server was killed");
    await ask(page, "Tell me a long story about a lion and a mouse.");
    await page.waitForFunction(() => [...document.querySelectorAll(".message.assistant .message-body")].at(-1)?.innerText.length > 10);
    if (await page.locator(".message.writing").count()) break;
  }
  child.kill("SIGKILL");
  await answered(page);
  if ((await answer(page).locator(".trouble").count()) > 0) {
    assert.match(await answer(page).locator(".trouble").innerText(), /lost|cut off/);
    assert.ok((await answer(page).locator(".message-body").innerText()).length > 10);
  }
  await ask(page, "Are you there?");
  await answered(page);
  assert.match(await answer(page).locator(".trouble").innerText(), /cannot be reached/);
  await serve(new URL(url).port);
  await page.getByRole("button", { name: "Retry" }).last().click();
  await page.waitForFunction(() => !document.querySelector(".writing") && ![...document.querySelectorAll(".message.assistant")].at(-1).querySelector(".trouble"));
  assert.ok((await answered(page)).length > 0);
});
