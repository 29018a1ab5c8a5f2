// `schemas`: each model as JSON, in the ways that clients send it. `check`: reads {model: [answers]}, and says which are invalid.
import { readFileSync } from "node:fs";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { models, optional } from "./models.mjs";

const all = { ...models, ...optional };
const attempt = (make) => { try { return make(); } catch (error) { return { refused: String(error.message) }; } };

if (process.argv[2] === "schemas") {
  const told = {};
  for (const [name, model] of Object.entries(all)) {
    told[name] = {
      format: attempt(() => zodResponseFormat(model, "answer")),
      tool: attempt(() => { const { type, function: f } = zodFunction({ name: "answer", parameters: model }); return { type, function: f }; }),
      plain: attempt(() => z.toJSONSchema(model)),
      draft7: attempt(() => z.toJSONSchema(model, { target: "draft-7" })),
    };
  }
  console.log(JSON.stringify(told));
} else {
  const wrong = [];
  for (const [name, answers] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
    for (const answer of answers) {
      const parsed = all[name].safeParse(JSON.parse(answer));
      if (!parsed.success) wrong.push([name, answer, JSON.stringify(parsed.error.issues).slice(0, 400)]);
    }
  }
  console.log(JSON.stringify(wrong));
}
