// Pictures of every view, to look at: node look.mjs FOLDER
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { ADMIN_KEY, start } from "./mock.mjs";
import { answered, ask, close, open } from "./harness.mjs";

const folder = process.argv[2];
await mkdir(folder, { recursive: true });
const server = await start();
server.state.past = 280;
const LOOKS = {
  light: {}, dark: { dark: true }, narrow: { width: 360, height: 740, touch: true }, chinese: { locale: "zh-CN" }, narrow_dark_chinese: { width: 360, height: 740, touch: true, dark: true, locale: "zh-CN" },
};
for (const [name, look] of Object.entries(LOOKS)) {
  if (process.argv[3] && !process.argv[3].split(",").includes(name)) continue;
  const page = await open(server.url, look);
  const shot = async (what) => {
    await page.waitForTimeout(250);
    await page.screenshot({ path: path.join(folder, `${name}-${what}.png`) });
  };
  await shot("welcome");
  for (const text of ["What can you tell me about this server?", "markdown please"]) {
    await ask(page, text);
    await answered(page);
  }
  await page.evaluate(() => document.querySelector(".scroller").scrollTo(0, 330));
  await shot("chat");
  await page.evaluate(() => document.querySelector(".scroller").scrollTo(0, 99_999));
  await page.getByRole("button", { name: /Token probabilities|词元概率/ }).last().click();
  await page.locator(".token").nth(8).hover();
  await shot("tokens");
  await page.mouse.move(0, 0);
  await ask(page, "die now");
  await answered(page);
  await shot("error");
  const list = page.locator(".list-button");
  if (await list.isVisible()) {
    await list.click();
    await shot("list");
    await page.keyboard.press("Escape");
  }
  const settings = page.getByRole("button", { name: /^(Settings|设置)$/ }).first();
  if (!(await page.locator(".sampling").isVisible())) await settings.click();
  await shot("settings");
  await page.goto(`${server.url}/#live`);
  await page.waitForSelector(".tile");
  await page.waitForTimeout(1200);
  await page.locator(".chart").first().hover({ position: { x: 120, y: 30 } });
  await shot("live");
  await page.locator(".heat canvas").first().scrollIntoViewIfNeeded();
  await page.locator(".heat canvas").first().hover();
  await shot("experts");
  await page.goto(`${server.url}/#admin`);
  await shot("sign-in");
  await page.fill("#admin-key", ADMIN_KEY);
  await page.press("#admin-key", "Enter");
  await page.waitForSelector(".key-cards");
  await shot("keys");
  await page.getByRole("button", { name: /New key|新建密钥/ }).click();
  await page.locator("dialog input").first().fill("Reports");
  await shot("new-key");
  await page.locator("dialog button[type=submit]").click();
  await page.waitForSelector(".secret");
  await shot("secret");
  await page.keyboard.press("Escape");
  for (const part of ["usage", "audit", "settings"]) {
    await page.click(`#tab-${part}`);
    await page.waitForTimeout(300);
    await shot(part === "settings" ? "engine" : part);
  }
  await page.evaluate(() => document.activeElement.blur());
  await page.keyboard.press("?");
  await shot("help");
  if (page.troubles.length > 0) console.log(name, page.troubles);
  await page.context().close();
}
await close();
await server.stop();
