/**
 * `node refuse.mjs [NAME…]`: the cases of tests/refusals/data/NAME.json, by default of all files. Prints one JSON object: by file, how many there
 * are, and those of which the package says something else than the Python SDK. Deno and Bun run it too.
 *
 * `LACRE_SOURCE`: the folder `src` of another copy of the package.
 */

import { readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { pathToFileURL } from "node:url";

import { run } from "./refusals.mjs";

const data = new URL("../refusals/data/", import.meta.url);
const named = process.env.LACRE_SOURCE;
const source = named ? pathToFileURL(`${named}/`) : new URL("../../sdk/javascript/src/", import.meta.url);
const names = process.argv.slice(2);
const all = readdirSync(data).map((file) => file.replace(/\.json$/, ""));
const found = {};
for (const name of names.length ? names : all.sort()) {
  const content = JSON.parse(readFileSync(new URL(`${name}.json`, data), "utf8"));
  found[name] = await run((path) => import(new URL(path, source)), name, content);
}
console.log(JSON.stringify(found));
