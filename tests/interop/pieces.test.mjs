/** What comes in very many pieces, or in none that ends, fails as everything else: typed, and within bounds. */

import { deepStrictEqual as same, rejects } from "node:assert";
import { test } from "node:test";

import { TooLargeError } from "../../sdk/javascript/src/errors.js";
import { readUpTo } from "../../sdk/javascript/src/exchange/problems.js";
import { Splice } from "../../sdk/javascript/src/exchange/splice.js";
import { ascii, concat } from "../../sdk/javascript/src/wire/bytes.js";

const MANY = 200_000; // more than an engine takes as the arguments of one call

/** A response in pieces of this size. */
function inPieces(count, size) {
  let left = count;
  return new Response(
    new ReadableStream({
      pull: (controller) => (left-- > 0 ? controller.enqueue(new Uint8Array(size).fill(left % 256)) : controller.close()),
    }),
  );
}

test("a body in very many pieces is read up to its limit", async () => {
  const read = await readUpTo(inPieces(MANY, 1), MANY, "it");
  same([read.length, read[0], read[MANY - 1]], [MANY, (MANY - 1) % 256, 0]);
  await rejects(readUpTo(inPieces(MANY, 1), MANY - 1, "it"), TooLargeError);
  same((await readUpTo(inPieces(3, 5000), 15_000, "it")).length, 15_000);
  same((await readUpTo(new Response(null), 10, "it")).length, 0);
});

test("very many parts become one", () => {
  same(concat(Array(MANY).fill(Uint8Array.of(7))).length, MANY);
});

test("a mark may name very many tokens", () => {
  const splice = new Splice(true);
  splice.feed(ascii(`id: 1.0.${MANY}:${Array(MANY).fill(7).join(",")}\ndata: {}\n\n`));
  same(splice.tokens.length, MANY);
});
