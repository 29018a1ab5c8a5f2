// What the client programs for Node ask for, as asked.py says it for Python's. Prints JSON: each feature's result, or its error.
export const PLAIN = "[[plain]] Name a sea, in a few words.";
export const LONG = "[[long]] Tell of the waves.";
export const SLOW = "[[slow]] Tell of the waves.";
export const WEATHER = "[[weather]] How is the weather in Vienna?";
export const THINK = "[[think]] Are seas salt?";
export const MOOD = "[[mood]] How do you feel, and how many points do you give?";
export const TEXTS = ["a cat", "a kitten"];
export const GREEDY = { temperature: 0 }; // so that a real model says the same each time
export const PIECES = 3; // that a program takes of an answer before it leaves
export const CITY = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
export const MOODS = {
  type: "object",
  properties: { mood: { type: "string", enum: ["good", "bad"] }, points: { type: "integer" } },
  required: ["mood", "points"],
  additionalProperties: false,
};

export const weather = ({ city }) => `sunny in ${city}`;

/** Runs those of the features that the command line names. Then it lives on until its stdin ends. */
export async function tell(features) {
  const told = {};
  for (const name of process.argv.slice(2)) {
    try {
      told[name] = await features[name]();
    } catch (error) {
      told[name] = { error: `${error.name}: ${error.message}`.slice(0, 2000) };
    }
  }
  console.log(JSON.stringify(told));
  for await (const _ of process.stdin);
}
