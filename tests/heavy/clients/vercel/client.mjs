// Vercel's `ai`, with its provider for servers that speak OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, isStepCount, jsonSchema, Output, streamText, tool } from "ai";
import { GREEDY, LONG, MOOD, MOODS, PIECES, PLAIN, SLOW, TEXTS, THINK, WEATHER, CITY, tell, weather } from "../../../ecosystem/programs/asked.mjs";

const { MODEL, EMBEDDER, OPENAI_BASE_URL: baseURL, OPENAI_API_KEY: apiKey } = process.env;
const provider = createOpenAICompatible({ name: "lacre", baseURL, apiKey, supportsStructuredOutputs: true });
const given = { model: provider(MODEL), maxRetries: 0, ...GREEDY };
const answer = async (prompt) => ({ text: (await generateText({ ...given, prompt })).text });

await tell({
  chat: () => answer(PLAIN),
  async stream() {
    const pieces = [];
    for await (const text of streamText({ ...given, prompt: PLAIN }).textStream) pieces.push(text);
    return { text: pieces.join(""), pieces: pieces.length };
  },
  async tools() {
    const offered = tool({ description: "Tells the weather", inputSchema: jsonSchema(CITY), execute: weather });
    const { text } = await generateText({ ...given, prompt: WEATHER, tools: { weather: offered }, stopWhen: isStepCount(3) });
    return { text };
  },
  async structured() {
    const output = Output.object({ schema: jsonSchema(MOODS) });
    return (await generateText({ ...given, prompt: MOOD, output })).output;
  },
  async reasoning() {
    const { text, reasoningText } = await generateText({ ...given, prompt: THINK });
    return { text, thought: reasoningText };
  },
  async embeddings() {
    const model = provider.embeddingModel(EMBEDDER);
    const { embeddings } = await embedMany({ model, values: TEXTS, maxRetries: 0 });
    return { length: embeddings[0].length, many: embeddings.length };
  },
  async cancellation() {
    const leaving = new AbortController();
    let pieces = 0;
    for await (const _ of streamText({ ...given, prompt: SLOW, abortSignal: leaving.signal }).textStream) {
      if (++pieces === PIECES) {
        leaving.abort();
        break;
      }
    }
    return { pieces };
  },
  long: () => answer(LONG),
});
