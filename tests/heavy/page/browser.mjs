/** What both scripts need: Chromium, a line to the test, axe-core, pictures. */

import { mkdirSync, readFileSync } from "node:fs";
import { env } from "node:process";
import { createInterface } from "node:readline";

import { chromium } from "playwright-core";

export const PATIENCE = 120_000; // ms: the machine may be busy
const AXE = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

export const told = { axe: {}, errors: [], foreign: [] };

/** Asks the test to do something, and waits until it is done. */
export async function ask(what) {
  console.log(JSON.stringify({ do: what }));
  return JSON.parse((await lines.next()).value);
}

export async function launched(more = []) {
  return chromium.launch({ executablePath: env.CHROMIUM, args: ["--no-sandbox", ...more], timeout: PATIENCE });
}

/** A new browser profile, and a page in it whose errors and requests are kept. */
export async function opened(browser, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, ...options });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on("pageerror", (error) => told.errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && told.errors.push(message.text()));
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(`${env.ORIGIN}/`) && !url.startsWith("blob:") && !url.startsWith("data:")) told.foreign.push(url);
  });
  return page;
}

/** Lists axe-core's serious findings in a view. */
export async function checked(page, view) {
  if (!(await page.evaluate("typeof axe"))?.includes("object")) await page.evaluate(AXE);
  const found = await page.evaluate(async () => {
    const { violations } = await axe.run(document, { resultTypes: ["violations"] });
    return violations.map(({ id, impact, nodes }) => ({ id, impact, nodes: nodes.slice(0, 3).map(({ target, failureSummary }) => [String(target), failureSummary]) }));
  });
  told.axe[view] = found.filter(({ impact }) => impact === "serious" || impact === "critical");
}

export async function pictured(page, name) {
  if (!env.SCREENS) return;
  mkdirSync(env.SCREENS, { recursive: true });
  await page.waitForTimeout(300); // a drawer moves
  await page.screenshot({ path: `${env.SCREENS}/${name}.png` });
}

/** The last answer, once it has ended. */
export async function ended(page) {
  const last = page.locator("article.assistant").last();
  await last.waitFor();
  await page.waitForFunction(() => document.querySelectorAll('article.assistant[aria-busy="true"]').length === 0, null, { timeout: PATIENCE });
  return page.locator("article.assistant").last();
}

export async function sent(page, text) {
  const area = page.getByRole("textbox", { name: "Message" });
  await area.fill(text);
  await area.press("Enter");
}
