/** Compact JWS with EdDSA (RFC 7515, RFC 8037): each statement has one spelling, and the verifier names the `typ` it expects. */

import { TrustError } from "../errors.js";
import { ascii, fromBase64url } from "../wire/bytes.js";
import { verifies } from "./ed25519.js";
import { object, parseJson, text } from "./json.js";

export const MAX_TOKEN = 524288;

/** Parsed is not verified: that is `isBy`. */
export class Jws {
  #signed;
  #signature;
  #acceptable;

  /** @param {unknown} token @param {string} typ @param {number} [limit] of its characters */
  constructor(token, typ, limit = MAX_TOKEN) {
    if (typeof token !== "string" || token.length > limit) throw new TrustError("a token is not text, or too long");
    const parts = token.split(".");
    const [header, payload, signature] = parts.map(fromBase64url);
    if (parts.length !== 3 || !header || !payload || !signature) throw new TrustError("a token is not a compact JWS");
    const { alg, typ: found, crit, b64 = true, kid = "" } = object(parseJson(header, "a token's header"), "a token's header");
    if (crit !== undefined || b64 === false) throw new TrustError("a token demands extensions"); // RFC 7515 section 4.1.11, RFC 7797
    text(kid, "kid");
    this.payload = payload;
    this.#acceptable = alg === "EdDSA" && found === typ;
    this.#signed = ascii(token.slice(0, token.lastIndexOf(".")));
    this.#signature = signature;
  }

  /** @param {Uint8Array} key */
  async isBy(key) {
    return this.#acceptable && (await verifies(key, this.#signature, this.#signed));
  }

  /** @param {string} what */
  claims(what) {
    return object(parseJson(this.payload, what), what);
  }
}

/** The claims of a token that `key` signed. @param {unknown} token @param {string} typ @param {Uint8Array} key */
export async function verifiedClaims(token, typ, key) {
  const jws = new Jws(token, typ);
  if (!(await jws.isBy(key))) throw new TrustError(`the ${typ} is not signed by the expected key`);
  return jws.claims(`the ${typ}`);
}
