// What a hostile model writes does nothing but stand there.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { answer, answered, ask, close, open } from "./harness.mjs";
import { HOSTILE, start } from "./mock.mjs";

let server;
before(async () => (server = await start()));
after(async () => {
  await close();
  await server.stop();
});

test("hostile Markdown becomes text, whatever it tries", async () => {
  const page = await open(server.url);
  const began = Date.now();
  await ask(page, "hostile please");
  await answered(page);
  assert.ok(Date.now() - began < 8000, `${Date.now() - began} ms`);
  const body = answer(page).locator(".message-body");
  const found = await body.evaluate((body) => {
    const allowed = new Set("P BR A SPAN CODE PRE DIV EM STRONG DEL H3 H4 H5 H6 UL OL LI BLOCKQUOTE HR TABLE THEAD TBODY TR TH TD BUTTON INPUT svg path".split(" "));
    const elements = [...body.querySelectorAll("*")];
    return {
      foreign: elements.filter((element) => !allowed.has(element.tagName)).map((element) => element.tagName),
      handlers: elements.flatMap((element) => element.getAttributeNames().filter((name) => name.startsWith("on") || name === "style" || name === "srcdoc")),
      links: elements.filter((element) => element.tagName === "A").map((link) => ({ href: link.getAttribute("href"), rel: link.rel, target: link.target, text: link.textContent, title: link.title })),
      deepest: Math.max(...elements.map((element) => { let depth = 0; for (let at = element; at !== body; at = at.parentElement) depth += 1; return depth; })),
      text: body.textContent,
    };
  });
  assert.deepEqual([found.foreign, found.handlers], [[], []]);
  assert.ok(found.deepest < 60, String(found.deepest));
  for (const link of found.links) {
    assert.match(link.href, /^(https?:|mailto:)/);
    assert.match(link.rel, /noopener.*noreferrer/);
    assert.equal(link.target, "_blank");
    assert.equal(link.title, link.href);
  }
  // Letters that look like others are written out where the address is shown.
  assert.ok(found.links.some((link) => link.title.includes("xn--")));
  // An address with a name before the host is none to follow.
  assert.ok(!found.links.some((link) => link.href.includes("evil.example") && link.text === "user"));
  // Characters that turn the direction of text are made visible, tags stay as they were written.
  assert.ok(found.text.includes("U+202E") && !/[\u202a-\u202e\u2066-\u2069]/.test(found.text));
  for (const part of ["<script>window.pwned = 1</script>", "<svg onload=", "<iframe srcdoc="]) assert.ok(found.text.includes(part), part);
  // Neither by itself nor by every click.
  for (const link of await body.locator("a, .refused-link, td, code").all()) {
    await link.dispatchEvent("mouseover");
  }
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.deepEqual(page.foreign, []);
  assert.deepEqual(page.troubles, []);
  // The same out of the storage.
  await page.reload();
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.deepEqual([page.foreign, page.troubles], [[], []]);
});

test("tokens, titles and notices are text too", async () => {
  const page = await open(server.url);
  await ask(page, "hostile <img src=x onerror=window.pwned=1>");
  await answered(page);
  await answer(page).getByRole("button", { name: "Token probabilities" }).click();
  const spans = page.locator(".token");
  assert.ok((await spans.count()) > 3);
  await spans.nth(1).dispatchEvent("pointerover");
  assert.equal(await page.locator(".token-card img, .tokens img, .entries img, .conversation-title img").count(), 0);
  assert.equal(await page.evaluate(() => window.pwned), undefined);
});

test("the policy holds: neither markup from strings nor inline scripts nor other servers", async () => {
  const page = await open(server.url);
  const outcome = await page.evaluate(async () => {
    const results = {};
    try {
      document.createElement("div").innerHTML = "<b>x</b>";
      results.markup = "allowed";
    } catch (error) {
      results.markup = error.name;
    }
    const script = document.createElement("script");
    try {
      script.textContent = "window.inline = 1";
      document.body.append(script);
    } catch {
      // Trusted types may already refuse the text.
    }
    results.inline = window.inline ?? "refused";
    results.fetch = await fetch("https://evil.example/").then(() => "allowed", (error) => error.name);
    // Later, for what the debugger runs itself may do more.
    results.eval = await new Promise((resolve) => setTimeout(() => { try { resolve((0, eval)("1")); } catch (error) { resolve(error.name); } }));
    return results;
  });
  assert.deepEqual(outcome, { markup: "TypeError", inline: "refused", fetch: "TypeError", eval: "EvalError" });
});

test("Markdown is rendered as it is meant", async () => {
  const page = await open(server.url);
  const html = (source) => page.evaluate(async (source) => {
    const { render } = await import("/assets/markdown.js");
    const target = document.createElement("div");
    // In pieces, as it comes: the outcome is that of the whole.
    for (let end = 1; end < source.length; end += 3) render(target, source.slice(0, end));
    render(target, source);
    const whole = document.createElement("div");
    render(whole, source);
    if (whole.innerHTML !== target.innerHTML) return `pieces: ${target.innerHTML}`;
    return target.innerHTML;
  }, source);
  const cases = {
    "a *b* __c__ ~~d~~ `e*f*`": "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e*f*</code></p>",
    "***both*** and **bold*": "<p><em><strong>both</strong></em> and *<em>bold</em></p>",
    "snake_case_name 2*3*4 ": "<p>snake_case_name 2<em>3</em>4</p>",
    "# One\nTwo\nthree": "<h3>One</h3><p>Two<br>three</p>",
    "- a\n- b\n  1. c\n  2. d\n\n3) e": "<ul><li><span>a</span></li><li><span>b</span><ol><li><span>c</span></li><li><span>d</span></li></ol></li></ul><ol start=\"3\"><li><span>e</span></li></ol>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "\\*not\\* &lt;b&gt; &#8212; <b>x</b>": "<p>*not* &lt;b&gt; — &lt;b&gt;x&lt;/b&gt;</p>",
    "他说**“好”**。": "<p>他说<strong>“好”</strong>。</p>",
    "---": "<hr>",
    "In\n2024. It was": "<p>In<br>2024. It was</p>",
    "**": "<p>**</p>",
    "x ********": "<p>x ********</p>",
    "": "",
  };
  for (const [source, expected] of Object.entries(cases)) assert.equal((await html(source)).trimEnd(), expected, source);
  assert.match(await html("| a | b |\n|:-:|--:|\n| 1 \\| 2 | `x` |\n\nend"), /<td class="align-center">1 \| 2<\/td><td class="align-right"><code>x<\/code>/);
  assert.match(await html("```js\nlet a = `x`;\n\n  b\n```\nafter"), /<code>let a = `x`;\n\n {2}b<\/code>.*<p>after<\/p>$/s);
  assert.match(await html("see https://a.example/x_(y). And (https://b.example)"), /href="https:\/\/a.example\/x_\(y\)".*<\/a>\. And \(<a href="https:\/\/b.example\/"/);
});
