/** The worker's receipt (docs/wire.md section 11): signed by the pool, for this very request, and for a file that the manifest names. */

import { InvalidReceiptError, TrustError, WrongModelError } from "../errors.js";
import { equal, fromBase64url } from "../wire/bytes.js";
import { ofVersionOne } from "../trust/json.js";
import { verifiedClaims } from "../trust/jws.js";

export const TRAILER = "lacre-receipt";
const PREFIX = "sha256:";

/**
 * @typedef {{ enc: string, model: string, prompt_tokens: number, cached_tokens: number, completion_tokens: number, start: number,
 *             end: number, final: boolean, token: string }} Receipt
 */

/**
 * @param {import("../wire/bhttp.js").Field[]} trailers
 * @param {{ key: Uint8Array, digest: Uint8Array, ceiling: number }} expected
 * @returns {Promise<Receipt>}
 */
export async function receiptOf(trailers, { key, digest, ceiling }) {
  const tokens = trailers.filter(([name]) => name === TRAILER).map(([, value]) => value);
  if (tokens.length !== 1) throw new InvalidReceiptError(`the answer has ${tokens.length} receipts instead of one`);
  let claims;
  try {
    claims = ofVersionOne(await verifiedClaims(tokens[0], "lacre-receipt+jwt", key), "the receipt");
  } catch (cause) {
    if (!(cause instanceof TrustError)) throw cause;
    throw new InvalidReceiptError("the answer's receipt is not signed by the pool's receipt key", { cause });
  }
  const { enc, model, start, end, final } = claims;
  const counts = [claims.prompt_tokens, claims.cached_tokens, claims.completion_tokens];
  if (!counts.every((each) => Number.isSafeInteger(each) && each >= 0) || typeof model !== "string") {
    throw new InvalidReceiptError("the answer's receipt is not of its form");
  }
  if (![start, end].every(Number.isFinite) || typeof final !== "boolean") {
    throw new InvalidReceiptError("the answer's receipt is not of its form");
  }
  const named = fromBase64url(enc);
  if (!named || !equal(named, digest) || !final) {
    throw new InvalidReceiptError("the answer's receipt is for another request, or not for all of this one");
  }
  if (claims.completion_tokens > ceiling) {
    throw new InvalidReceiptError(`the receipt claims ${claims.completion_tokens} tokens, and the request allows ${ceiling}`);
  }
  if (claims.cached_tokens > claims.prompt_tokens) throw new InvalidReceiptError("the receipt claims more cached tokens than prompt tokens");
  return /** @type {Receipt} */ ({ ...claims, token: tokens[0] });
}

/**
 * The digests that the receipt of this model may name; none: any. Throws if the manifest contradicts the caller's pin.
 * @param {string} model @param {string[]} listed in hex @param {string | undefined} pin `sha256:…`
 */
export function digestsOf(model, listed, pin) {
  const named = listed.map((each) => PREFIX + each);
  if (pin === undefined) return named;
  if (named.length && !named.includes(pin)) {
    throw new WrongModelError(`the manifest names ${named.join(", ")} for the model ${model} instead of the pinned ${pin}; nothing was sent`);
  }
  return [pin];
}

/**
 * An empty name passes if no model had to run.
 * @param {Receipt} receipt @param {string} model @param {string[]} digests @param {boolean} ran
 */
export function checkModel(receipt, model, digests, ran) {
  if (!digests.length || digests.includes(receipt.model) || (receipt.model === "" && !ran)) return;
  throw new WrongModelError(`the receipt names ${receipt.model || "no file"} for the model ${model} instead of ${digests.join(", ")}`);
}
