/**
 * A sealed chat by the npm package `lacre`.
 *
 *     LACRE_URL='lacre://host?trust=…' LACRE_TOKEN=… node ask.mjs '{"kems": ["xwing"], …}' '{"stream": true, …}' PROMPT…
 *
 * asks the prompts one after the other. Options are those of `sealedFetch`; the second object is merged into the request's body. Prints one JSON line for each piece of an
 * answer, {"piece": …}, and a last one, {"done": true, …}, once the answer is known to be whole. On failure one JSON line goes to
 * stderr, and the exit code is 1. `listeners`: so many are left on the program's one signal.
 */

import { getEventListeners } from "node:events";
import { argv, env, stderr, stdout } from "node:process";

import { BASE_URL, infoOf, LacreError, refusalOf, sealedFetch } from "../../sdk/javascript/src/index.js";
import { EventBlocks, field } from "../../sdk/javascript/src/exchange/events.js";

const told = (to, line) => to.write(JSON.stringify(line) + "\n");
const { signal } = new AbortController();
const left = () => getEventListeners(signal, "abort").length;

async function* events(body) {
  const blocks = new EventBlocks();
  for await (const bytes of body) for (const lines of blocks.feed(bytes)) yield field(lines, "data").join("\n");
}

async function main([options, body, ...prompts]) {
  const fetch = await sealedFetch(env.LACRE_URL, { token: env.LACRE_TOKEN, ...JSON.parse(options) });
  for (const prompt of prompts) await ask(fetch, JSON.parse(body), prompt);
}

async function ask(fetch, body, prompt) {
  const asked = { messages: [{ role: "user", content: prompt }], stream: true, stream_options: { include_usage: true }, ...body };
  const headers = { accept: "text/event-stream", "content-type": "application/json", authorization: "Bearer of-openai", "user-agent": "x", "x-stainless-os": "y" };
  const response = await fetch(`${BASE_URL}/chat/completions`, { method: "POST", headers, body: JSON.stringify(asked), signal });
  const refusal = refusalOf(response);
  if (refusal) throw refusal;
  if (!response.ok) return told(stdout, { done: true, status: response.status, body: await response.json(), info: infoOf(response), listeners: left() });
  let usage = null;
  const names = new Set();
  if (!asked.stream) ({ usage } = await response.json());
  else {
    for await (const data of events(response.body)) {
      if (data === "" || data === "[DONE]") continue; // padding is a comment, an event without data
      const event = JSON.parse(data);
      usage = event.usage ?? usage;
      names.add(event.id);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) told(stdout, { piece });
    }
  }
  told(stdout, { done: true, status: response.status, usage, names: names.size, info: infoOf(response), listeners: left() });
}

main(argv.slice(2)).catch((error) => {
  if (!(error instanceof LacreError)) throw error;
  const { name, message, remedy, type, attempts } = error;
  told(stderr, { error: name, message, remedy, type, attempts, listeners: left() });
  process.exitCode = 1;
});
