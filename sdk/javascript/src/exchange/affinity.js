/**
 * A conversation's affinity (docs/wire.md section 12): lets a gateway send its turns to one worker, which has the beginning in its
 * cache. It is a keyed digest of everything up to the first message by the user, which all turns and branches have in common.
 */

import { toBase64url, utf8 } from "../wire/bytes.js";
import { hmac } from "../wire/ohttp.js";

const SIZE = 16; // bytes of the value

/** How the conversation of a chat's body begins; null if no message is by a user. @param {Record<string, any>} body @returns {string | null} */
export function beginningOf(body) {
  const given = body.messages ?? body.input;
  const turns = typeof given === "string" ? [{ role: "user", content: given }] : given;
  if (!Array.isArray(turns)) return null;
  const first = turns.findIndex((turn) => turn?.role === "user");
  return first < 0 ? null : JSON.stringify([[body.instructions ?? null, body.system ?? null], turns.slice(0, first + 1)]);
}

/** salt: of the prefix cache, as it is sealed. @param {string} salt @param {string} pool @param {string} model @param {string} beginning */
export async function affinityOf(salt, pool, model, beginning) {
  const value = await hmac(utf8(salt), utf8(["lacre affinity", pool, model, beginning].join("\0")));
  return toBase64url(value.subarray(0, SIZE));
}
