/** As node.mjs, in a page of Chromium: `CHROMIUM=… node page.mjs FILE`. Its web server has the package and that file, for this run alone. */

import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, join, normalize } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const sdk = join(here, "..", "..", "sdk", "javascript");
const { chromium } = createRequire(join(here, "..", "..", "tests", "heavy", "browser", "package.json"))("playwright-core");
const map = readFileSync(join(sdk, "importmap.json"), "utf8");
const page = `<!doctype html><script type="importmap">${map}</script>`;

function fileOf(path) {
  if (path === "/answer.json") return process.argv[2];
  if (path === "/opening.mjs") return join(here, "opening.mjs");
  return join(sdk, normalize(path));
}

const server = createServer(({ url }, response) => {
  try {
    const body = url === "/" ? page : readFileSync(fileOf(url));
    response.writeHead(200, { "content-type": url === "/" ? "text/html" : /js$/.test(url) ? "text/javascript" : "application/json" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"], timeout: 120_000 });
try {
  const tab = await browser.newPage();
  await tab.goto(`http://127.0.0.1:${server.address().port}/`);
  await tab.evaluate(async () => {
    const { prepared } = await import("/opening.mjs");
    window.open_ = await prepared((path) => import(`/src/${path}`), await (await fetch("/answer.json")).json());
  });
  console.log("ready");
  for await (const _ of createInterface({ input: process.stdin })) console.log(JSON.stringify(await tab.evaluate(() => window.open_())));
} finally {
  await browser.close();
  server.close();
}
