/** Keys, and what they sign, as an operator's and a gateway's tools make them. */

import { generateKeyPairSync, sign } from "node:crypto";

import { ascii, toBase64url } from "../../sdk/javascript/src/wire/bytes.js";

export function newKey() {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return { privateKey, raw: Uint8Array.from(Buffer.from(publicKey.export({ format: "jwk" }).x, "base64url")) };
}

export const json = (value) => ascii(JSON.stringify(value));

export function jws(payload, key, typ, alg = "EdDSA") {
  const bytes = payload instanceof Uint8Array ? payload : json(payload);
  const signed = `${toBase64url(json({ alg, typ }))}.${toBase64url(bytes)}`;
  return `${signed}.${toBase64url(sign(null, ascii(signed), key.privateKey))}`;
}
