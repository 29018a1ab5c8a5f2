/**
 * The clients of `chaos.load`, by the npm package: `node load.mjs PLAN OUT`, with the same plan and the same lines of JSON.
 *
 * A client a token, each with a memory of its own. What it draws from the seed is its own too.
 */

import { readFileSync, openSync, writeSync } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";

import { BASE_URL, infoOf, LacreError, ProblemError, ProcessMemory, refusalOf, sealedFetch } from "../../sdk/javascript/src/index.js";
import { EventBlocks, field } from "../../sdk/javascript/src/exchange/events.js";

const HUNG = 180_000; // ms, as in load.py
const KINDS = { streamed: 45, whole: 30, long: 10, cancelled: 15 };
const MODELS = { echo: 85, "smollm2-135m": 15 };
const WORDS = ["mare", "nostrum", "aestus", "procella", "portus", "nauta", "velum", "ancora"];
const LONG = 30;
const TOKENS = { streamed: 16, whole: 16, long: 60, cancelled: 60 };

const plan = JSON.parse(readFileSync(process.argv[2], "utf8"));
const out = openSync(process.argv[3], "w");
const told = (line) => writeSync(out, JSON.stringify(line) + "\n");
const clock = () => Number(process.hrtime.bigint()) / 1e9;

/** Numbers from 0 to 1 that depend on the seed alone (mulberry32). */
function chanceOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

const chance = chanceOf(plan.seed);
function drawn(weights) {
  let left = chance() * Object.values(weights).reduce((sum, each) => sum + each, 0);
  return Object.keys(weights).find((name) => (left -= weights[name]) < 0);
}

function question(number) {
  const ended = { number, kind: drawn(KINDS), model: drawn(MODELS), at: 0, took: 0, how: "hung", error: "", typed: true, right: true, resumed: 0, receipts: [] };
  const words = ended.kind === "long" ? LONG : 2 + Math.floor(chance() * 5);
  return { ended, said: Array.from({ length: words }, () => WORDS[Math.floor(chance() * WORDS.length)]).join(" ") };
}

/** An echo says what was said; of what the real model says, only that it says something is known. */
function right({ model }, said, text, whole) {
  if (model !== "echo") return text !== "";
  return whole ? text === said : said.startsWith(text);
}

async function* texts(body) {
  const blocks = new EventBlocks();
  for await (const bytes of body) {
    for (const lines of blocks.feed(bytes)) {
      const data = field(lines, "data").join("\n");
      if (data === "" || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw Object.assign(new Error(event.error.message), { name: "ApiError" });
      const text = event.choices?.[0]?.delta?.content;
      if (text) yield text;
    }
  }
}

async function asked(fetch, ended, said) {
  const limit = ended.model === "echo" ? 400 : TOKENS[ended.kind];
  const body = { model: ended.model, messages: [{ role: "user", content: said }], max_tokens: limit, stream: ended.kind !== "whole" };
  const init = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal: AbortSignal.timeout(HUNG) };
  const response = await fetch(`${BASE_URL}/chat/completions`, init);
  const refusal = refusalOf(response);
  if (refusal) throw refusal;
  if (!response.ok) throw Object.assign(new Error(await response.text()), { name: "ApiError" });
  const { parts } = infoOf(response);
  let text = "";
  try {
    if (ended.kind === "whole") text = (await response.json()).choices[0].message.content;
    else {
      let pieces = 0;
      for await (const piece of texts(response.body)) {
        text += piece;
        pieces += 1;
        if (ended.kind === "cancelled" && pieces === 5) {
          [ended.how, ended.right] = ["cancelled", right(ended, said, text, false)];
          return;
        }
      }
    }
  } finally {
    for (const { audit } of parts) if (audit) told({ proof: audit.header });
    ended.resumed = parts.length - 1;
  }
  [ended.how, ended.right] = ["whole", right(ended, said, text, true)];
  const receipts = parts.map(({ receipt }) => receipt).filter((each) => each !== null);
  ended.receipts = receipts.map((each) => [each.enc, each.prompt_tokens, each.cached_tokens, each.completion_tokens]);
}

/** An error of the API inside a good seal is the API's own, as `ApiError` is in Python. */
function failed(ended, error) {
  if (error.name === "TimeoutError") return;
  const problem = error instanceof ProblemError ? ` (${error.type.split(/[:#]/).pop()})` : "";
  [ended.how, ended.error] = ["error", `${error.name}${problem}`];
  ended.typed = error.name === "ApiError" || (error instanceof LacreError && Boolean(error.remedy));
  if (!ended.typed) console.error(error);
}

async function one(fetch, { ended, said }) {
  ended.at = clock();
  await asked(fetch, ended, said).catch((error) => failed(ended, error));
  ended.took = clock() - ended.at;
  told({ ended });
}

const clients = await Promise.all(plan.tokens.map((token) => sealedFetch(plan.url, { token, shape: "none", memory: new ProcessMemory() })));
const began = clock();
const running = [];
for (let number = 0; number < Math.floor(plan.seconds * plan.rate); number++) {
  await sleep(Math.max(0, (began + number / plan.rate - clock()) * 1000));
  running.push(one(clients[number % clients.length], question(number)));
}
await Promise.all(running);
