/** What a client trusts and why: the connection string, the manifest and the choice of a key (sections 2 and 3 of wire.md). */

import { createPublicKey, verify } from "node:crypto";

import { fromBase64url, toBase64url } from "./bytes.mjs";
import { ConfigurationError, LacreError, NoUsableKeyError, TrustError } from "./errors.mjs";
import { exchange, problemOf, readUpTo } from "./http.mjs";
import { parseKeyConfiguration } from "./keys.mjs";
import { readRoutes } from "./routes.mjs";

export const MAX_DOCUMENT = 1024 * 1024;
export const MAX_TOKEN = 524288;
const MAX_ROOTS = 1000;
const MAX_CLOCK_SKEW = 300;
const LOOPBACK = /^(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])$/i;

export const clock = () => Date.now() / 1000;

/** `lacre://host[:port]?trust=…` as { base, root }: the gateway's URL and its pinned root key. */
export function parseConnectionString(text) {
  const match = /^(lacre|lacre\+http):\/\/([^/?#@\s]+)\/?\?([^#]*)$/.exec(text);
  if (!match) throw new ConfigurationError("a connection string is lacre://host[:port]?trust=KEY");
  const [, scheme, host, query] = match;
  const trusts = new URLSearchParams(query).getAll("trust");
  const root = trusts.length === 1 ? fromBase64url(trusts[0]) : null;
  if (root?.length !== 32) throw new ConfigurationError("a connection string has exactly one trust, a key of 32 bytes");
  let base;
  try {
    base = new URL(`${scheme === "lacre" ? "https" : "http"}://${host}`);
  } catch (cause) {
    throw new ConfigurationError("the host of the connection string is not one", { cause });
  }
  if (base.protocol === "http:" && !LOOPBACK.test(base.hostname)) {
    throw new ConfigurationError("lacre+http: is for the loopback interface alone");
  }
  return { base, root };
}

/** A compact JWS (RFC 7515 section 3.1). Parsed is not verified: that is `isBy`, which takes EdDSA and the expected typ alone. */
class Jws {
  #signed;
  #signature;
  #acceptable;

  constructor(token, typ) {
    if (typeof token !== "string" || token.length > MAX_TOKEN) throw new TrustError("a token is not text, or too long");
    const parts = token.split(".");
    const [header, payload, signature] = parts.map(fromBase64url);
    if (parts.length !== 3 || !header || !payload || !signature) throw new TrustError("a token is not a compact JWS");
    const { alg, typ: found, crit } = object(parseJson(header, "a token's header"), "a token's header");
    if (crit !== undefined) throw new TrustError("a token demands extensions"); // RFC 7515 section 4.1.11
    this.payload = payload;
    this.#acceptable = alg === "EdDSA" && found === typ;
    this.#signed = Buffer.from(token.slice(0, token.lastIndexOf(".")), "ascii");
    this.#signature = signature;
  }

  isBy(key) {
    if (!this.#acceptable) return false;
    try {
      // RFC 8037 section 3.1: Ed25519 signs the text as it stands.
      const publicKey = createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x: toBase64url(key) }, format: "jwk" });
      return verify(null, this.#signed, publicKey, this.#signature);
    } catch {
      return false; // the bytes are no key
    }
  }

  claims(what) {
    return object(parseJson(this.payload, what), what);
  }
}

/** The claims of a token that `key` signed; an error otherwise. */
export function verifiedClaims(token, typ, key) {
  const jws = new Jws(token, typ);
  if (!jws.isBy(key)) throw new TrustError(`the ${typ} is not signed by the key it should be`);
  return jws.claims(`the ${typ}`);
}

/** Verifies a manifest document against a root key, at a time in seconds. */
export function verifyDocument(bytes, root, now = clock()) {
  if (bytes.length > MAX_DOCUMENT) throw new TrustError("a manifest document has at most 1 MiB");
  const document = object(parseJson(bytes, "the document"), "the document");
  const statement = followRoots(list(document.roots, "roots"), root);
  if (statement.exp <= now) throw new TrustError("the root's statement has expired");

  const manifest = readManifest(verifiedClaims(document.manifest, "lacre-manifest+jwt", statement.signer));
  if (manifest.exp <= now) throw new TrustError("the manifest has expired");
  if (manifest.iat > now + MAX_CLOCK_SKEW) throw new TrustError("the manifest is from the future");
  return { ...manifest, token: document.manifest };
}

/** Along the chain of roots from the pinned one; gives the last statement, which alone counts. */
function followRoots(entries, pinned) {
  if (entries.length > MAX_ROOTS) throw new TrustError(`a chain of more than ${MAX_ROOTS} statements`);
  let current = pinned;
  let accepted = null;
  for (const entry of entries) {
    const tokens = list(entry, "an entry of roots").map((token) => new Jws(token, "lacre-root+jwt"));
    if (tokens.length < 1 || tokens.length > 2) throw new TrustError("an entry of roots holds one token, or two");
    const ours = tokens.find((jws) => jws.isBy(current));
    if (!ours) {
      if (accepted) throw new TrustError("the chain of roots has a gap");
      continue; // from before the pin
    }
    accepted = readStatement(ours.claims("a root statement"));
    const next = accepted.nextRoot;
    if (next && !equal(next, current)) {
      const counterSigned = tokens.some((jws) => equal(jws.payload, ours.payload) && jws.isBy(next));
      if (!counterSigned) throw new TrustError("the next root has not signed its own statement");
      current = next;
    }
  }
  if (!accepted) throw new TrustError("no statement is by the pinned root");
  return accepted;
}

function readStatement(claims) {
  if (claims.typ !== "lacre-root") throw new TrustError("a root statement is not of its typ");
  const nextRoot = member(claims, "next_root");
  return { signer: key32(claims.signer), exp: time(claims.exp), nextRoot: nextRoot === null ? null : key32(nextRoot) };
}

function readManifest(claims) {
  if (!Number.isSafeInteger(claims.ver) || claims.ver < 0) throw new TrustError("ver is not a whole number from 0");
  const pools = Object.entries(object(claims.pools, "pools")).map(([name, pool]) => [name, readPool(object(pool, "a pool"))]);
  return {
    iss: text(claims.iss),
    ver: claims.ver,
    iat: time(claims.iat),
    exp: time(claims.exp),
    gatewayKey: key32(claims.gateway_key),
    pools: new Map(pools),
    routes: readRoutes(claims.routes),
  };
}

function readPool(pool) {
  const keys = list(pool.keys, "keys").map((key) => {
    const encoded = fromBase64url(object(key, "a key").config);
    if (!encoded) throw new TrustError("a key's config is not base64url");
    return { config: keyConfiguration(encoded), notAfter: time(key.not_after) };
  });
  const models = new Map(Object.entries(object(pool.models, "models")).map(([name, entry]) => [name, readModel(entry)]));
  const defaultModel = member(pool, "default_model");
  if (defaultModel === null ? models.size > 0 : !models.has(defaultModel)) {
    throw new TrustError("default_model is not one of the pool's models");
  }
  return {
    models,
    defaultModel,
    keys,
    receiptKey: key32(pool.receipt_key),
    shapes: list(pool.shapes, "shapes").map(text),
  };
}

/** The digests and signers of one model, in hex; no digest: any file may be served. */
function readModel(entry) {
  const { sha256, signers } = object(entry, "a model");
  const [digests, ids] = [list(sha256, "sha256"), list(signers, "signers")];
  if (![...digests, ...ids].every((each) => /^[0-9a-f]{64}$/.test(text(each)))) {
    throw new TrustError("a digest or signer of a model is not 64 hexadecimal digits");
  }
  return { sha256: digests, signers: ids };
}

/** Parsed, or null for one of a suite that is unknown here. A malformed one spoils the whole manifest. */
function keyConfiguration(encoded) {
  try {
    return parseKeyConfiguration(encoded);
  } catch (cause) {
    throw new TrustError("a key configuration is malformed", { cause });
  }
}

/** The pool's first current key of the first KEM, by name and in the caller's order, that it has one for. */
export function chooseKey(pool, kems = ["xwing"], now = clock()) {
  for (const name of kems) {
    const found = pool.keys.find(({ config, notAfter }) => notAfter > now && config?.kem.name === name);
    if (found) return found.config;
  }
  throw new NoUsableKeyError(`the pool offers no key for ${kems.join(" or ")}`);
}

/** A gateway as one client sees it: fetches its manifest, verifies it, and remembers the newest. */
export class Trust {
  #newest = null; // the document's bytes, and what they say

  constructor(base, root) {
    this.base = base;
    this.root = root;
  }

  async fetch() {
    const answer = await exchange("GET", new URL("/v1/manifest", this.base));
    if (answer.status !== 200) throw await problemOf(answer);
    return this.accept(await readUpTo(MAX_DOCUMENT, answer, "the manifest document"));
  }

  /** The manifest to use once `bytes` were served: never one older than the newest that was verified. */
  accept(bytes, now = clock()) {
    const served = verifyDocument(bytes, this.root, now);
    const known = this.#newest?.manifest;
    if (known && served.ver === known.ver && served.token !== known.token) {
      throw new TrustError(`two manifests of version ${served.ver}`);
    }
    if (known && served.ver < known.ver) return verifyDocument(this.#newest.bytes, this.root, now);
    this.#newest = { bytes, manifest: served };
    return served;
  }
}

const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function parseJson(bytes, what) {
  try {
    return JSON.parse(UTF8.decode(bytes));
  } catch (cause) {
    throw new TrustError(`${what} is not JSON`, { cause });
  }
}

function object(value, what) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new TrustError(`${what} is not an object`);
  return value;
}

function list(value, what) {
  if (!Array.isArray(value)) throw new TrustError(`${what} is not a list`);
  return value;
}

function text(value) {
  if (typeof value !== "string") throw new TrustError("a member that should be text is not, or is missing");
  return value;
}

function time(value) {
  if (!Number.isFinite(value)) throw new TrustError("a time is not a number, or is missing");
  return value;
}

function key32(value) {
  const key = fromBase64url(value);
  if (key?.length !== 32) throw new TrustError("a key is not 32 bytes of base64url, or is missing");
  return key;
}

function member(claims, name) {
  if (!Object.hasOwn(claims, name)) throw new TrustError(`${name} is missing`);
  return claims[name];
}

const equal = (one, other) => Buffer.compare(one, other) === 0;

/**
 * Whether a receipt is the pool's, of this very request, and of a file that the manifest names for the model that ran, if it
 * names any (section 11). Its claims, or null.
 */
export function readReceipt(token, pool, digest, model) {
  try {
    const claims = verifiedClaims(token, "lacre-receipt+jwt", pool.receiptKey);
    const accepted = (pool.models.get(model)?.sha256 ?? []).map((each) => `sha256:${each}`);
    const named = accepted.length === 0 || accepted.includes(claims.model);
    return claims.enc === toBase64url(digest) && named ? claims : null;
  } catch (error) {
    if (error instanceof LacreError) return null;
    throw error;
  }
}
