// `@anthropic-ai/sdk`: the Messages API, which needs a `max_tokens`.
import Anthropic from "@anthropic-ai/sdk";
import { GREEDY, LONG, MOOD, MOODS, PIECES, PLAIN, SLOW, THINK, WEATHER, CITY, tell, weather } from "../programs/asked.mjs";

const given = { model: process.env.MODEL, max_tokens: 512, ...GREEDY };
const client = new Anthropic({ maxRetries: 0 });
const said = (text) => [{ role: "user", content: text }];
const created = (text, more = {}) => client.messages.create({ ...given, messages: said(text), ...more });
const textOf = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");
const isText = (event) => event.type === "content_block_delta" && event.delta.type === "text_delta";

await tell({
  chat: async () => ({ text: textOf(await created(PLAIN)) }),
  async stream() {
    const pieces = [];
    for await (const event of await created(PLAIN, { stream: true })) {
      if (isText(event)) pieces.push(event.delta.text);
    }
    return { text: pieces.join(""), pieces: pieces.length };
  },
  async tools() {
    const tools = [{ name: "weather", description: "Tells the weather", input_schema: CITY }];
    const { content } = await created(WEATHER, { tools });
    const call = content.find((block) => block.type === "tool_use");
    const result = { type: "tool_result", tool_use_id: call.id, content: weather(call.input) };
    const messages = [...said(WEATHER), { role: "assistant", content }, { role: "user", content: [result] }];
    return { text: textOf(await created(WEATHER, { tools, messages })) };
  },
  async structured() {
    const output_config = { format: { type: "json_schema", schema: MOODS } };
    return JSON.parse(textOf(await created(MOOD, { output_config })));
  },
  async reasoning() {
    const message = await created(THINK, { max_tokens: 2048, thinking: { type: "enabled", budget_tokens: 1024 } });
    const thoughts = message.content.filter((block) => block.type === "thinking");
    return { text: textOf(message), thought: thoughts.map((block) => block.thinking).join("") };
  },
  async cancellation() {
    let pieces = 0;
    for await (const event of await created(SLOW, { stream: true })) {
      if (isText(event) && ++pieces === PIECES) break;
    }
    return { pieces };
  },
  long: async () => ({ text: textOf(await created(LONG, { max_tokens: 2048 })) }),
});
