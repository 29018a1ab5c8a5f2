/** A gateway for one program, in place of the network: it serves real signed manifests, and refuses what is sealed. */

import { ProcessMemory, sealedFetch } from "../../sdk/javascript/src/index.js";
import { toBase64url } from "../../sdk/javascript/src/wire/bytes.js";
import { json, jws, newKey } from "./signing.mjs";

const XWING = Uint8Array.from([1, 0x64, 0x7a, ...new Uint8Array(1216).fill(9), 0, 4, 0, 1, 0, 2]);
const now = () => Math.floor(Date.now() / 1000);

export class LocalGateway {
  /** What came, as paths. */
  paths = [];
  #root = newKey();
  #signer = newKey();
  #other = toBase64url(newKey().raw);
  #statement = jws({ typ: "lacre-root", signer: toBase64url(this.#signer.raw), exp: now() + 86400, next_root: null }, this.#root, "lacre-root+jwt");

  /** manifest, sealed: answer to one request each. */
  constructor({ models = { m: [] }, routes = {}, manifest = () => new Response(this.document()), sealed = refusal } = {}) {
    Object.assign(this, { models, routes, manifest, sealed });
  }

  /** A manifest that was made now, and is valid for an hour. */
  document(ver = 1, signer = this.#signer) {
    const exp = now() + 3600;
    const models = Object.fromEntries(Object.entries(this.models).map(([name, sha256]) => [name, { sha256, signers: [] }]));
    const keys = [{ config: toBase64url(XWING), not_after: exp }];
    const pool = { models, default_model: Object.keys(models)[0], keys, receipt_key: this.#other, shapes: ["pad"] };
    const claims = { iss: "test", ver, iat: now(), exp, gateway_key: this.#other, pools: { default: pool }, routes: this.routes };
    return json({ roots: [[this.#statement]], manifest: jws(claims, signer, "lacre-manifest+jwt") });
  }

  /** A manifest by a key that nobody named. */
  forged() {
    return this.document(9, newKey());
  }

  /** A sealed fetch to this gateway. */
  client(options = {}) {
    const url = `lacre://gateway.example?trust=${toBase64url(this.#root.raw)}`;
    return sealedFetch(url, { token: "t", retries: 0, memory: new ProcessMemory(), fetch: this.#answer, ...options });
  }

  #answer = async (url) => {
    this.paths.push(url.pathname);
    return url.pathname === "/v1/manifest" ? this.manifest() : this.sealed();
  };
}

export const MANIFEST = "/v1/manifest";
export const SEALED = "/v1/sealed";

/** @param {string} [type] */
export function refusal(type = "urn:lacre:problem:forbidden") {
  const body = JSON.stringify({ type, title: "Said in a test", status: 403 });
  return new Response(body, { status: 403, headers: { "content-type": "application/problem+json" } });
}
