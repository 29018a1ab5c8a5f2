// `openai`: its chat API.
import OpenAI from "openai";
import { GREEDY, LONG, MOOD, MOODS, PIECES, PLAIN, SLOW, TEXTS, THINK, WEATHER, CITY, tell, weather } from "../programs/asked.mjs";

const { MODEL: model, EMBEDDER } = process.env;
const client = new OpenAI({ maxRetries: 0 });
const said = (text) => [{ role: "user", content: text }];
const created = (text, more = {}) => client.chat.completions.create({ model, ...GREEDY, messages: said(text), ...more });
const answer = async (text) => ({ text: (await created(text)).choices[0].message.content });

await tell({
  chat: () => answer(PLAIN),
  async stream() {
    const pieces = [];
    for await (const chunk of await created(PLAIN, { stream: true })) {
      const text = chunk.choices[0]?.delta.content;
      if (text) pieces.push(text);
    }
    return { text: pieces.join(""), pieces: pieces.length };
  },
  async tools() {
    const tools = [{ type: "function", function: { name: "weather", description: "Tells the weather", parameters: CITY } }];
    const { message } = (await created(WEATHER, { tools })).choices[0];
    const [call] = message.tool_calls;
    const result = { role: "tool", tool_call_id: call.id, content: weather(JSON.parse(call.function.arguments)) };
    const after = await created(WEATHER, { tools, messages: [...said(WEATHER), message, result] });
    return { text: after.choices[0].message.content };
  },
  async structured() {
    const response_format = { type: "json_schema", json_schema: { name: "mood", strict: true, schema: MOODS } };
    return JSON.parse((await created(MOOD, { response_format })).choices[0].message.content);
  },
  async reasoning() {
    const { message } = (await created(THINK)).choices[0];
    return { text: message.content, thought: message.reasoning_content };
  },
  async embeddings() {
    const { data } = await client.embeddings.create({ model: EMBEDDER, input: TEXTS });
    return { length: data[0].embedding.length, many: data.length };
  },
  async cancellation() {
    let pieces = 0;
    for await (const _ of await created(SLOW, { stream: true })) {
      if (++pieces === PIECES) break;
    }
    return { pieces };
  },
  long: () => answer(LONG),
});
