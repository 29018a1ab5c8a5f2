/** Opens the console over TLS: prints what a browser that trusts its certificate sees, and what another one is told.
 *
 *     CHROMIUM=… CONSOLE=https://127.0.0.1:… LINK=… PIN=… node tls.mjs
 *
 * PIN: the SHA-256 of the certificate's public key, in base64. Chromium accepts that key and no other unknown one.
 */

import { env } from "node:process";

import { chromium } from "playwright-core";

const PATIENCE = 60_000; // ms: the machine may be busy
const told = { faults: [] };

async function visited(pin, seen) {
  const args = ["--no-sandbox", `--ignore-certificate-errors-spki-list=${pin}`];
  const browser = await chromium.launch({ executablePath: env.CHROMIUM, args, timeout: PATIENCE });
  try {
    const context = await browser.newContext();
    context.setDefaultTimeout(PATIENCE);
    const page = await context.newPage();
    await seen(page, context);
  } finally {
    await browser.close();
  }
}

await visited(env.PIN, async (page, context) => {
  page.on("pageerror", (error) => told.faults.push(String(error)));
  page.on("console", (line) => line.type() === "error" && told.faults.push(line.text()));
  const answer = await page.goto(env.LINK);
  told.protocol = (await answer.securityDetails()).protocol;
  await page.click("button");
  await page.waitForURL(`${env.CONSOLE}/console/`);
  told.pages = [];
  for (const name of ["", "requests", "keys", "workers", "audit", "me"]) {
    const shown = await page.goto(`${env.CONSOLE}/console/${name}`);
    told.pages.push([shown.status(), await page.textContent("h1")]);
  }
  told.cookies = (await context.cookies()).map(({ name, secure, httpOnly }) => [name.slice(0, 7), secure, httpOnly]);
  await page.click("text=Sign out");
  told.out = await page.textContent("h1");
});
await visited(Buffer.alloc(32).toString("base64"), async (page) => {
  told.refused = await page.goto(`${env.CONSOLE}/console/`).then(() => "opened", (error) => /net::(\w+)/.exec(error.message)?.[1]);
});
console.log(JSON.stringify(told));
