// A browser for the tests. playwright-core comes from the folder that run.sh installs it into, Chromium from the system.
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.env.BROWSER_MODULES ?? process.cwd(), "modules.js"));
const { chromium } = require("playwright-core");

const ARGUMENTS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

let browser = null;

export async function open(url, { width = 1280, height = 800, dark = false, locale = "en-GB", touch = false, init } = {}) {
  browser ??= await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGUMENTS });
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: dark ? "dark" : "light", locale, hasTouch: touch, acceptDownloads: true, permissions: ["clipboard-read", "clipboard-write"] });
  const page = await context.newPage();
  page.setDefaultTimeout(10_000);
  page.troubles = [];
  // Violations of the policy are among these.
  page.on("console", (message) => message.type() === "error" && page.troubles.push(message.text()));
  page.on("pageerror", (error) => page.troubles.push(String(error)));
  page.foreign = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(new URL(url).origin) && !/^(data|blob):/.test(request.url())) page.foreign.push(request.url());
  });
  if (init) await page.addInitScript(init);
  await page.goto(url);
  await page.waitForSelector(".app-head");
  return page;
}

export async function close() {
  await browser?.close();
  browser = null;
}

/** Types a question and sends it. */
export async function ask(page, text) {
  await page.fill("#question", text);
  await page.press("#question", "Enter");
}

export const answer = (page) => page.locator(".message.assistant").last();

/** Waits until the last answer is complete and gives its text. */
export async function answered(page) {
  await page.waitForSelector(".message.assistant:last-child:not(.writing)", { timeout: 30_000 });
  return answer(page).locator(".message-body").innerText();
}

/** Nothing may be wider than the window. */
export const overflows = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
