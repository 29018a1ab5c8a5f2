/**
 * Vercel's `ai`, sealed by the npm package, in one program: prints one JSON line for each check.
 *
 *     LACRE_URL=… LACRE_TOKEN=… node by_vercel.mjs FOLDER_WITH_AI
 */

import { createRequire } from "node:module";
import { argv, env } from "node:process";
import { pathToFileURL } from "node:url";

import { BASE_URL, sealedFetch } from "../../../sdk/javascript/src/index.js";

const require = createRequire(`${argv[2]}/package.json`);
const from = (name) => import(pathToFileURL(require.resolve(name)));
const { createOpenAICompatible } = await from("@ai-sdk/openai-compatible");
const { generateText, streamText } = await from("ai");

const fetch = await sealedFetch(env.LACRE_URL, { token: () => env.LACRE_TOKEN });
const provider = createOpenAICompatible({ name: "lacre", baseURL: BASE_URL, fetch });
const given = { model: provider("tiny"), maxRetries: 0, prompt: "Name three numbers." };
const tell = (name, value) => console.log(JSON.stringify({ [name]: value }));

tell("whole", (await generateText(given)).text);

const pieces = [];
for await (const piece of streamText(given).textStream) pieces.push(piece);
tell("streamed", { text: pieces.join(""), several: pieces.length > 1 });

const leaving = new AbortController();
let taken = 0;
for await (const _ of streamText({ ...given, abortSignal: leaving.signal }).textStream) {
  taken += 1;
  leaving.abort(); // the gateway holds the rest of this answer back
}
tell("left", taken < 3);

const nobody = createOpenAICompatible({ name: "lacre", baseURL: BASE_URL, fetch: fetch.with({ pool: "nobody" }) });
await generateText({ ...given, model: nobody("tiny") }).catch(({ name, message }) => tell("refused", { name, message }));
