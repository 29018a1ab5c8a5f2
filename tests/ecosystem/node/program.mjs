// What programs do with Node's `openai`, by name. The address and the key are the proxy's; nothing here knows of Lacre.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const greedy = {
  model: "smollm2-135m", temperature: 0, max_tokens: 12,
  messages: [{ role: "user", content: "Name the colours of the rainbow." }],
};
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object", properties: { city: { type: "string", maxLength: 24 } }, required: ["city"], additionalProperties: false,
    },
  },
};

const does = {
  async chat() {
    const completion = await client.chat.completions.create(greedy);
    return { text: completion.choices[0].message.content };
  },
  async stream() {
    const pieces = [];
    for await (const chunk of await client.chat.completions.create({ ...greedy, stream: true })) {
      if (chunk.choices[0]?.delta?.content) pieces.push(chunk.choices[0].delta.content);
    }
    return { text: pieces.join(""), pieces: pieces.length };
  },
  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return { models: found.sort() };
  },
  async tools() {
    const completion = await client.chat.completions.create({
      ...greedy, max_tokens: 64, tools: [tool], tool_choice: { type: "function", function: { name: "get_weather" } },
      parallel_tool_calls: false,
    });
    const [call] = completion.choices[0].message.tool_calls;
    return { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
  },
  async embeddings() {
    const found = await client.embeddings.create({ model: "all-minilm-l6-v2", input: ["a cat", "a kitten"] });
    return { length: found.data[0].embedding.length, many: found.data.length };
  },
  async errors() {
    try {
      await client.chat.completions.create({ ...greedy, model: "gone" });
    } catch (error) {
      return { name: error.constructor.name, code: error.code, status: error.status };
    }
    throw new Error("a model that is not there answered");
  },
};

const told = {};
for (const name of process.argv.slice(2)) told[name] = await does[name]();
console.log(JSON.stringify(told));
