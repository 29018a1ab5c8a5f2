/**
 * Chromium on a page that seals: prints one JSON object with what each check saw.
 *
 *     CHROMIUM=… PAGE=http://127.0.0.1:… STRANGER=http://localhost:… LACRE_URL=… LACRE_TOKEN=… node drive.mjs
 */

import { env } from "node:process";

import { chromium } from "playwright-core";

const PATIENCE = 120_000; // ms: the machine may be busy
const given = { url: env.LACRE_URL, token: env.LACRE_TOKEN, model: env.MODEL };
const browser = await chromium.launch({ executablePath: env.CHROMIUM, args: ["--no-sandbox"], timeout: PATIENCE });
const told = {};

/** What the function says in a page of this address, or its error. */
async function within(page, check) {
  return page.evaluate(check, given);
}

async function opened(context, address) {
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on("pageerror", (error) => console.error(String(error)));
  await page.goto(`${address}/page.html`);
  await page.waitForFunction(() => window.loaded === true);
  return page;
}

try {
  const context = await browser.newContext();
  const page = await opened(context, env.PAGE);

  told.whole = await within(page, async ({ url, token, model }) => {
    const fetch = await lacre.sealedFetch(url, { token });
    const openai = new OpenAI({ fetch, baseURL: lacre.BASE_URL, apiKey: "x", maxRetries: 0, dangerouslyAllowBrowser: true });
    const asked = { model, messages: [{ role: "user", content: "one two" }] };
    const { data, response } = await openai.chat.completions.create(asked).withResponse();
    const [{ audit, receipt, kem, requestId }] = lacre.infoOf(response).parts;
    return { text: data.choices[0].message.content, kem, index: audit.index >= 0, tokens: receipt.completion_tokens, named: requestId !== null };
  });

  told.streamed = await within(page, async ({ url, token, model }) => {
    const fetch = await lacre.sealedFetch(url, { token });
    const openai = new OpenAI({ fetch, baseURL: lacre.BASE_URL, apiKey: "x", maxRetries: 0, dangerouslyAllowBrowser: true });
    const asked = { model, messages: [{ role: "user", content: "one two" }], stream: true };
    let [text, events] = ["", 0];
    for await (const event of await openai.chat.completions.create(asked)) {
      text += event.choices[0]?.delta?.content ?? "";
      events += 1;
    }
    const leaving = new AbortController();
    const response = await fetch(`${lacre.BASE_URL}/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(asked),
      signal: leaving.signal,
    });
    const reader = response.body.getReader();
    await reader.read();
    leaving.abort();
    const left = await reader.read().then(() => "read on", (error) => error.name);
    return { text, several: events > 2, left };
  });

  told.refused = await within(page, async ({ url, token }) => {
    const fetch = await lacre.sealedFetch(url, { token });
    const response = await fetch(`${lacre.BASE_URL}/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "missing", messages: [{ role: "user", content: "x" }] }),
    });
    const refusal = lacre.refusalOf(response);
    return { status: response.status, type: refusal?.type, named: Boolean(refusal?.requestId) };
  });

  told.vercel = await within(page, async ({ url, token, model }) => {
    const { createOpenAICompatible, generateText, streamText } = await import("ai");
    const fetch = await lacre.sealedFetch(url, { token });
    const provider = createOpenAICompatible({ name: "lacre", baseURL: lacre.BASE_URL, fetch });
    const given = { model: provider(model), maxRetries: 0, prompt: "one two" };
    const { text } = await generateText(given);
    const pieces = [];
    for await (const piece of streamText(given).textStream) pieces.push(piece);
    const nobody = createOpenAICompatible({ name: "lacre", baseURL: lacre.BASE_URL, fetch: fetch.with({ pool: "nobody" }) });
    const refused = await generateText({ ...given, model: nobody(model) }).then(() => "answered", ({ message }) => message.includes("nobody"));
    return { text, streamed: pieces.join(""), several: pieces.length > 1, refused };
  });

  told.refusals = await page.evaluate(async (names) => {
    const { run } = await import("/refusals.mjs");
    const found = {};
    for (const name of names) {
      const content = await (await fetch(`/refusals/${name}.json`)).json();
      found[name] = await run((path) => import(`/node_modules/lacre/src/${path}`), name, content);
    }
    return found;
  }, env.REFUSALS.split(","));

  const remembered = () =>
    new Promise((resolve, reject) => {
      const request = indexedDB.open("lacre", 1);
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const get = request.result.transaction("manifests").objectStore("manifests").get("seen");
        get.onsuccess = () => resolve(JSON.parse(get.result.text).seen.map(({ ver }) => ver));
      };
    });
  told.remembered = await page.evaluate(remembered);
  const second = await opened(context, env.PAGE);
  told.tabs = await Promise.all(
    [page, second].map((each) => within(each, async ({ url, token }) => (await (await lacre.sealedFetch(url, { token })).manifest()).ver)),
  );
  told.requested = await page.evaluate(() => performance.getEntriesByType("resource").map(({ name }) => name));

  const stranger = await opened(context, env.STRANGER);
  told.stranger = await within(stranger, ({ url, token }) =>
    lacre.sealedFetch(url, { token, retries: 0 }).then(() => "allowed", (error) => [error.name, error.remedy.includes("listen.origins")]),
  );
} finally {
  await browser.close();
}
console.log(JSON.stringify(told));
