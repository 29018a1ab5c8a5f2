/**
 * The package `openai`, sealed, in one program: prints one JSON line for each check.
 *
 *     LACRE_URL=… LACRE_TOKEN=… node by_openai.mjs FOLDER_WITH_OPENAI
 */

import { createRequire } from "node:module";
import { argv, env } from "node:process";
import { pathToFileURL } from "node:url";

import { BASE_URL, infoOf, sealedFetch } from "../../sdk/javascript/src/index.js";

const require = createRequire(`${argv[2]}/package.json`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")));
const fetch = await sealedFetch(env.LACRE_URL, { token: async () => env.LACRE_TOKEN });
const openai = new OpenAI({ fetch, baseURL: BASE_URL, apiKey: "sealed", maxRetries: 0 });
const asked = { model: "tiny", messages: [{ role: "user", content: "Name three numbers." }] };
const tell = (name, value) => console.log(JSON.stringify({ [name]: value }));

const { data, response } = await openai.chat.completions.create(asked).withResponse();
tell("whole", { text: data.choices[0].message.content, receipt: infoOf(response).parts[0].receipt.completion_tokens });

const pieces = [];
for await (const event of await openai.chat.completions.create({ ...asked, stream: true })) {
  pieces.push(event.choices[0]?.delta?.content ?? "");
}
tell("streamed", pieces.join(""));

let taken = 0;
for await (const _ of await openai.chat.completions.create({ ...asked, stream: true })) {
  taken += 1;
  break; // the gateway holds the rest of this answer back
}
const stream = await openai.chat.completions.create({ ...asked, stream: true });
for await (const _ of stream) {
  taken += 1;
  stream.controller.abort();
}
tell("left", taken < 6);

try {
  await openai.chat.completions.create({ ...asked, messages: [] });
} catch (error) {
  tell("refused", { name: error.constructor.name, status: error.status, message: error.message });
}

const users = fetch.with({ cacheScope: "ada" });
const again = new OpenAI({ fetch: users, baseURL: BASE_URL, apiKey: "sealed", maxRetries: 0 });
await again.chat.completions.create(asked);
await again.chat.completions.create(asked);
await openai.chat.completions.create({ ...asked, user: "bert" });
tell("done", true);
