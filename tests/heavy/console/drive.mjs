/**
 * Chromium at the operators' console: prints one JSON object with what each check saw, and writes a picture of each page.
 *
 *     CHROMIUM=… CONSOLE=http://127.0.0.1:… TOKEN=… SCREENS=FOLDER node drive.mjs
 *
 * TOKEN: an administrator's, for a link of its own to each browser that signs in. A link lives a minute.
 */

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { env } from "node:process";

import { chromium } from "playwright-core";

const PATIENCE = 60_000; // ms: the machine may be busy
const WIDE = { width: 1360, height: 900 };
const PHONE = { width: 390, height: 844 };
const PAGES = ["", "tenants", "tenant?tenant=acme", "requests", "policy", "keys", "workers", "audit", "me"];
const axe = await readFile(new URL(import.meta.resolve("axe-core/axe.min.js")), "utf8");
const browser = await chromium.launch({ executablePath: env.CHROMIUM, args: ["--no-sandbox"], timeout: PATIENCE });
let agreed = ""; // the question to which a person says yes
const told = { pages: {}, faults: [], requested: [], serious: {}, overflow: [] };

async function signedIn(options) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on("pageerror", (error) => told.faults.push(String(error)));
  page.on("console", (line) => line.type() === "error" && told.faults.push(line.text()));
  page.on("dialog", (dialog) => {
    if (dialog.message() === agreed) return dialog.accept();
    told.faults.push(`a dialog: ${dialog.message()}`);
    return dialog.dismiss();
  });
  page.on("request", (request) => told.requested.push(new URL(request.url()).origin));
  const headers = { authorization: `Bearer ${env.TOKEN}` };
  const made = await fetch(`${env.CONSOLE}/v1/console/links`, { method: "POST", headers }); // as `lacre admin open` asks
  await page.goto((await made.json()).url);
  told.offered = await page.textContent("main p");
  await page.click("button");
  await page.waitForURL(`${env.CONSOLE}/console/`);
  return page;
}

async function looked(page, name, kind) {
  await page.screenshot({ path: `${env.SCREENS}/${name}-${kind}.png`, fullPage: true });
  const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (over > 0) told.overflow.push(`${name} ${kind} by ${over} px`);
}

/** axe-core runs in a world of its own, which our content security policy does not reach. */
async function accessible(page, name) {
  const session = await page.context().newCDPSession(page);
  const { frameTree } = await session.send("Page.getFrameTree");
  const { executionContextId } = await session.send("Page.createIsolatedWorld", { frameId: frameTree.frame.id });
  await session.send("Runtime.evaluate", { expression: axe, contextId: executionContextId });
  const { result } = await session.send("Runtime.evaluate", {
    expression: `axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) => JSON.stringify(violations
      .filter(({ impact }) => impact === "serious" || impact === "critical")
      .map(({ id, nodes }) => [id, nodes.slice(0, 3).map(({ html }) => html)])))`,
    contextId: executionContextId,
    awaitPromise: true,
    returnByValue: true,
  });
  const found = JSON.parse(result.value);
  if (found.length) told.serious[name] = found;
}

try {
  for (const [kind, options] of [
    ["wide-light", { viewport: WIDE, colorScheme: "light" }],
    ["wide-dark", { viewport: WIDE, colorScheme: "dark" }],
    ["phone-light", { viewport: PHONE, colorScheme: "light", isMobile: true, hasTouch: true }],
    ["phone-dark", { viewport: PHONE, colorScheme: "dark", isMobile: true, hasTouch: true }],
  ]) {
    const page = await signedIn(options);
    for (const path of PAGES) {
      const name = path.split("?")[0] || "overview";
      const answer = await page.goto(`${env.CONSOLE}/console/${path}`);
      told.pages[name] = [answer.status(), await page.textContent("h1")];
      await looked(page, name, kind);
      await accessible(page, `${name} ${kind}`);
    }
    await page.goto(`${env.CONSOLE}/console/requests`);
    await page.click("tbody a.code");
    told.pages.request = [200, await page.textContent("h1")];
    await looked(page, "request", kind);
    await accessible(page, `request ${kind}`);
    if (kind === "wide-light") {
      await page.goto(`${env.CONSOLE}/console/policy`);
      await page.fill("input[name=subject]", "<img src=x onerror=alert(1)>");
      await page.fill("input[name=tenant]", "acme");
      await page.fill("input[name=max_tokens]", "99999");
      await page.click("text=Test >> nth=-1");
      await page.waitForSelector("text=output-ceiling");
      told.tested = await page.textContent("section .tag");
      await looked(page, "policy-tested", kind);
      await accessible(page, "policy-tested");
      await page.fill("textarea", '@id("nobody") forbid (principal, action, resource);');
      await page.click("button:text('Replay')");
      told.replayed = await page.textContent("[role=status] b");
      await looked(page, "policy-replayed", kind);
      await page.goto(`${env.CONSOLE}/console/workers`);
      agreed = "Have worker n2 take no more work?";
      await page.click("[aria-label='Drain worker n2']");
      await page.waitForSelector("[aria-label='Resume worker n2']");
      const row = page.locator("tr", { has: page.locator("[aria-label='Resume worker n2']") });
      told.drained = [await row.locator(".tag").textContent(), await row.locator("button").textContent()];
      await looked(page, "workers-drained", kind);
      await accessible(page, "workers-drained");
      await page.click("[aria-label='Resume worker n2']");
      told.drained.push((await page.textContent("[role=status]")).match(/takes work again/)?.[0]);
      agreed = "";
      await page.goto(`${env.CONSOLE}/console/audit`);
      await page.click("text=Verify every byte now");
      told.verified = await page.textContent("[role=status] b");
      const [download] = await Promise.all([page.waitForEvent("download"), page.click("text=Download the checkpoint")]);
      told.checkpoint = download.suggestedFilename();
      await page.goto(`${env.CONSOLE}/console/requests?subject=nobody`);
      told.empty = await page.textContent(".empty");
      told.session = (await page.context().cookies()).map(({ httpOnly, sameSite, path }) => [httpOnly, sameSite, path]);
      told.scripted = await page.evaluate(() => document.cookie);
      await page.keyboard.press("Tab");
      told.skip = await page.evaluate(() => document.activeElement.textContent);
      // The live part brings itself up to date, and keeps the page.
      await page.goto(`${env.CONSOLE}/console/`);
      await page.waitForFunction(() => /updated \d\d:\d\d:\d\d UTC/.test(document.querySelector("[data-live-note]").textContent));
      await page.evaluate(() => { document.querySelector("[data-live=state]").dataset.old = "yes"; });
      await page.waitForFunction(() => document.querySelector("[data-live=state]").dataset.old === undefined);
      told.live = true;
      // A page of another site: it can neither show the console nor send its forms.
      const evil = createServer((_request, response) => {
        response.setHeader("content-type", "text/html");
        response.end(`<iframe src="${env.CONSOLE}/console/workers"></iframe>
          <form method=post action="${env.CONSOLE}/console/drain"><input name=csrf value=x><button>x</button></form>`);
      });
      await new Promise((resolve) => { evil.listen(0, "127.0.0.1", resolve); });
      const before = told.faults.length;
      const stranger = await page.context().newPage();
      await stranger.goto(`http://localhost:${evil.address().port}/`);
      told.framed = await stranger.frames()[1].evaluate(() => document.body.textContent.includes("Live workers")).catch(() => false);
      await stranger.click("button");
      await stranger.waitForURL(`${env.CONSOLE}/console/drain`);
      told.crossed = await stranger.textContent("h1");
      evil.close();
      told.faults.splice(before); // Chromium reports that it refused the frame
      await page.goto(`${env.CONSOLE}/console/me`);
      await page.click("text=Sign out");
      told.out = await page.textContent("h1");
      await looked(page, "sign-in", kind);
      await accessible(page, "sign-in");
      await page.goto(`${env.CONSOLE}/console/keys`);
      told.kept = new URL(page.url()).pathname;
    }
    await page.context().close();
  }
} finally {
  await browser.close();
}
told.requested = [...new Set(told.requested)];
console.log(JSON.stringify(told));
