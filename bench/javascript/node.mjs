/** `node node.mjs FILE`: says `ready`, and for each line that comes runs bench/javascript/opening.mjs once on the answer in FILE. */

import { readFileSync } from "node:fs";
import process from "node:process";
import { createInterface } from "node:readline";

import { prepared } from "./opening.mjs";

const source = new URL("../../sdk/javascript/src/", import.meta.url);
const open = await prepared((path) => import(new URL(path, source)), JSON.parse(readFileSync(process.argv[2], "utf8")));
console.log("ready");
for await (const _ of createInterface({ input: process.stdin })) console.log(JSON.stringify(await open()));
