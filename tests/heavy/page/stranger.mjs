/**
 * Everybody else at the chat page: hostile answers, other origins, other ports, other names for this machine.
 *
 *     CHROMIUM=… LINK=… ORIGIN=http://127.0.0.1:… STRANGER=http://127.0.0.1:… EVIL=http://evil.example:… node stranger.mjs
 */

import { env } from "node:process";

import { ask, checked, ended, launched, opened, pictured, sent, told } from "./browser.mjs";

const browser = await launched(["--host-resolver-rules=MAP evil.example 127.0.0.1"]);
const HOSTILE = [
  "<script>window.struck = 1</script>",
  "<img src=x onerror=\"window.struck = 2\">",
  "<svg onload=\"window.struck = 3\"></svg>",
  "[a](javascript:window.struck=4)",
  "![b](https://evil.example/pixel.png)",
  "<iframe srcdoc=\"<script>parent.struck = 5</script>\"></iframe>",
  "<style>body { display: none }</style>",
  "```html\n<script>window.struck = 6</script>\n```",
  "[bank](https://evil.example/login)",
  "| <b onclick=\"window.struck=7\">x</b> |\n|---|\n| y |",
  "<form action=https://evil.example><button>z</button></form>",
  "<base href=https://evil.example/>",
];

/** What a page learns of a request to the proxy's page. */
async function reached(page, url, options) {
  return page.evaluate(
    ([target, given]) => fetch(target, given).then(async (response) => [response.type, response.status, (await response.text().catch(() => "")).length], (error) => error.name),
    [url, options],
  );
}

try {
  const page = await opened(browser);
  await page.goto(env.LINK);
  await page.getByRole("heading", { name: "What would you like to ask?" }).waitFor();

  // The echo answers with the question: each is the title, the answer, and the name of a file too
  told.struck = [];
  for (const text of HOSTILE) {
    await page.keyboard.press("Alt+n");
    await page.locator('.composer input[type="file"]').setInputFiles([{ name: `${text.replaceAll("/", "∕")}.txt`, mimeType: "text/plain", buffer: Buffer.from("x") }]);
    await page.locator(".composer .file").waitFor();
    await page.locator(".composer .file button").click();
    await sent(page, text);
    const answer = await ended(page);
    const built = await answer.locator(".markdown *").evaluateAll((elements) => elements.map(({ localName }) => localName));
    const links = await answer.locator(".markdown a").evaluateAll((elements) => elements.map(({ href, rel, target }) => [href, rel, target]));
    told.struck.push({ built: [...new Set(built)].sort(), links, error: await answer.locator(".failure").count() });
  }
  told.struckBy = await page.evaluate(() => window.struck ?? null);
  told.visible = await page.locator(".messages").isVisible();
  await pictured(page, "hostile-wide-light");
  // A picture, and a model that takes none: what helps is said once
  await page.keyboard.press("Alt+n");
  const png = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");
  await page.locator('.composer input[type="file"]').setInputFiles([{ name: "dot.png", mimeType: "image/png", buffer: png }]);
  await page.locator(".composer .thumb").waitFor();
  const drawn = await page.locator(".composer .thumb").evaluate((image) => image.naturalWidth);
  await sent(page, "What is in this picture?");
  const refused = await ended(page);
  told.picture = { drawn, says: await refused.locator(".failure p").allInnerTexts() };
  await checked(page, "failure");

  // By the policy itself, beside all that the page does: no script of ours could do it either
  told.policy = await page.evaluate(() => {
    const tried = {};
    for (const [name, act] of Object.entries({
      html: () => (document.createElement("div").innerHTML = "<b>x</b>"),
    })) {
      try {
        act();
        tried[name] = "allowed";
      } catch (error) {
        tried[name] = error.name;
      }
    }
    const inline = document.createElement("script");
    try {
      inline.textContent = "window.struck = 8";
    } catch {
      inline.append("window.struck = 8");
    }
    document.body.append(inline);
    return { ...tried, struck: window.struck ?? null };
  });
  told.errorsOfPolicy = told.errors.splice(0).length;

  // A page of another origin, and of another port of the same address
  for (const [name, origin] of [["port", env.STRANGER], ["evil", `http://evil.example:${new URL(env.STRANGER).port}`]]) {
    const other = await page.context().newPage();
    const frames = [];
    other.on("console", (message) => frames.push(message.text()));
    await other.goto(`${origin}/stranger.html`);
    told[name] = {
      read: await reached(other, `${env.ORIGIN}/page/api/chats`, { credentials: "include" }),
      post: await reached(other, `${env.ORIGIN}/page/api/chats/${"0".repeat(31)}1`, { method: "PUT", body: "{}", credentials: "include", headers: { "content-type": "application/json" } }),
      blind: await reached(other, `${env.ORIGIN}/page/api/link`, { method: "POST", mode: "no-cors", body: "{}", credentials: "include" }),
      script: await other.evaluate((url) => new Promise((resolve) => {
        const element = document.createElement("script");
        [element.src, element.onload, element.onerror] = [url, () => resolve("loaded"), () => resolve("refused")];
        document.body.append(element);
      }), `${env.ORIGIN}/page/tree.js`),
      framed: await other.evaluate((url) => new Promise((resolve) => {
        const element = document.createElement("iframe");
        element.onload = () => {
          try {
            resolve(element.contentDocument === null ? "closed" : element.contentDocument.body.innerText.slice(0, 20));
          } catch (error) {
            resolve(error.name);
          }
        };
        element.src = url;
        document.body.append(element);
      }), `${env.ORIGIN}/`),
      shown: other.frames().slice(1).map((frame) => frame.url()),
      popup: await other.evaluate((url) => {
        const opened = window.open(url, "_blank");
        return new Promise((resolve) => setTimeout(() => {
          try {
            resolve(opened.closed ? "cut off" : String(opened.document?.title));
          } catch (error) {
            resolve(error.name);
          }
        }, 1500));
      }, `${env.ORIGIN}/`),
    };
    await other.close();
  }
  told.frameErrors = told.errors.splice(0).length;
  told.stolen = await ask("use what the other port was sent");

  // DNS rebinding: another name of this address, at the page's own port
  const rebound = await opened(browser);
  const answered = await rebound.goto(`http://evil.example:${new URL(env.ORIGIN).port}/`);
  told.rebound = [answered.status(), await rebound.locator("h1").innerText(), await reached(rebound, "/page/api/chats", {})];
  await rebound.context().close();

  // Another person of this machine: no link, a used link
  const nobody = await opened(browser);
  told.nobody = [(await nobody.goto(env.ORIGIN)).status(), await nobody.locator("h1").innerText()];
  await checked(nobody, "closed");
  await pictured(nobody, "closed-wide-light");
  told.used = [(await nobody.goto(env.LINK)).status(), await nobody.locator("h1").innerText()];
  await checked(nobody, "used");
  told.errors.splice(0);

  // The key is nowhere that a page can look
  const key = new URL(env.LINK).searchParams.get("key");
  told.leaks = await page.evaluate((secret) => {
    const seen = [document.cookie, location.href, document.referrer, document.documentElement.outerHTML, JSON.stringify(history.state), ...performance.getEntries().map(({ name }) => name), ...Object.values(localStorage), ...Object.values(sessionStorage)];
    return seen.filter((text) => String(text).includes(secret)).length + (document.cookie ? 1 : 0);
  }, key);
  // A link in another page leads in too, though a browser keeps the cookie back at first
  const mail = await opened(browser);
  await mail.goto(`${env.STRANGER}/stranger.html`);
  await page.keyboard.press("Alt+,");
  await page.getByRole("button", { name: "Make a link" }).click();
  const link = await page.locator(".settings code.wrap").innerText();
  await mail.evaluate((url) => (location.href = url), link);
  await mail.getByRole("heading", { name: "What would you like to ask?" }).or(mail.locator("article.user")).first().waitFor();
  told.mail = mail.url();
  told.foreign = told.foreign.filter((url) => !url.startsWith(env.STRANGER) && !url.startsWith("http://evil.example:"));
} finally {
  await browser.close();
}
console.log(JSON.stringify({ told }));
process.exit(0);
