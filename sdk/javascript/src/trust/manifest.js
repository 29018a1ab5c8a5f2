/** The manifest's members (docs/wire.md section 3), and the choice of a key. Forms only: `chain.js` decides whom to believe. */

import { NoUsableKeyError, TrustError } from "../errors.js";
import { equal, fromBase64url } from "../wire/bytes.js";
import { parseKeyConfiguration } from "../wire/keys.js";
import { count, key32, list, object, ofVersionOne, optional, text, time } from "./json.js";
import { readRoutes } from "./routes.js";

/** @typedef {import("../wire/keys.js").KeyConfiguration} KeyConfiguration */
/** @typedef {{ config: KeyConfiguration | null, notAfter: number, receiptKey: Uint8Array | null }} PoolKey */
/** @typedef {{ sha256: string[], signers: string[], kind: string | null, context: number | null, maxOutput: number | null }} ModelEntry */
/** @typedef {{ models: Map<string, ModelEntry>, defaultModel: string | null, keys: PoolKey[], receiptKey: Uint8Array, shapes: string[] }} Pool */
/** @typedef {{ iss: string, ver: number, iat: number, exp: number, gatewayKeys: Uint8Array[], pools: Map<string, Pool>, routes: Map<string, import("./routes.js").Route> }} Manifest */
/** @typedef {{ signer: Uint8Array, exp: number, nextRoot: Uint8Array | null }} RootStatement */

const OTHER_KEYS = 8;
const MODALITIES = 8;
const MOST = 2147483647;
const OUTPUT = 4096; // tokens of one choice if neither the caller nor the manifest says
const KINDS = new Set(["generate", "embed", "rerank"]);
const WORD = /^[a-z0-9][a-z0-9_.-]{0,31}$/;
const HEX = /^[0-9a-f]{64}$/;

/** @param {Record<string, any>} claims @returns {RootStatement} */
export function readStatement(claims) {
  ofVersionOne(claims, "a root statement");
  if (claims.typ !== "lacre-root") throw new TrustError("a root statement does not say typ lacre-root");
  if (!Object.hasOwn(claims, "next_root")) throw new TrustError("next_root is missing");
  const nextRoot = claims.next_root === null ? null : key32(claims.next_root, "next_root");
  return { signer: key32(claims.signer, "signer"), exp: time(claims.exp, "exp"), nextRoot };
}

/** @param {RootStatement} one @param {RootStatement} other */
export function sameStatement(one, other) {
  const [next, theirs] = [one.nextRoot, other.nextRoot];
  const nexts = next === null || theirs === null ? next === theirs : equal(next, theirs);
  return equal(one.signer, other.signer) && one.exp === other.exp && nexts;
}

/** @param {Record<string, any>} claims @returns {Manifest} */
export function readManifest(claims) {
  const { other_gateway_keys: others = [] } = ofVersionOne(claims, "the manifest");
  const pools = Object.entries(object(claims.pools, "pools"));
  return {
    iss: text(claims.iss, "iss"),
    ver: count(claims.ver, "ver"),
    iat: time(claims.iat, "iat"),
    exp: time(claims.exp, "exp"),
    gatewayKeys: [claims.gateway_key, ...list(others, "other_gateway_keys", OTHER_KEYS)].map((key) => key32(key, "a gateway key")),
    pools: new Map(pools.map(([name, pool]) => [name, readPool(object(pool, "a pool"))])),
    routes: readRoutes(claims.routes),
  };
}

/** @param {Record<string, any>} pool @returns {Pool} */
function readPool(pool) {
  const found = new Map(Object.entries(object(pool.models, "models")).map(([name, entry]) => [name, readModel(entry)]));
  const { default_model: defaultModel, past_receipts: past = [] } = pool;
  const first = found.get(defaultModel);
  if (defaultModel === null ? found.size > 0 : first === undefined) {
    throw new TrustError("default_model is not one of the pool's models");
  }
  for (const { key, until } of list(past, "past_receipts").map((each) => object(each, "a past key"))) {
    key32(key, "a past key"); // for kept receipts alone: only its form is looked at
    time(until, "until");
  }
  return {
    models: first === undefined ? found : new Map([[defaultModel, first], ...found]), // the default first
    defaultModel,
    keys: list(pool.keys, "keys").map((key) => readKey(object(key, "a key"))),
    receiptKey: key32(pool.receipt_key, "receipt_key"),
    shapes: list(pool.shapes, "shapes").map((shape) => text(shape, "a shape")),
  };
}

/** @param {Record<string, any>} key @returns {PoolKey} */
function readKey(key) {
  const encoded = fromBase64url(key.config);
  if (!encoded) throw new TrustError("a key's config is not base64url");
  let config; // null for a suite that is unknown here. A malformed one makes the whole manifest invalid
  try {
    config = parseKeyConfiguration(encoded);
  } catch (cause) {
    throw new TrustError("a key configuration is malformed", { cause });
  }
  const receiptKey = optional(key.receipt_key, (value) => key32(value, "receipt_key"));
  return { config, notAfter: time(key.not_after, "not_after"), receiptKey };
}

/** @param {any} entry @returns {ModelEntry} */
function readModel(entry) {
  const { sha256, signers, kind, context, max_output, modalities = [], tools } = object(entry, "a model");
  const [digests, ids] = [list(sha256, "sha256"), list(signers, "signers")];
  if (![...digests, ...ids].every((each) => HEX.test(text(each, "a digest")))) {
    throw new TrustError("a digest or signer of a model is not 64 hexadecimal digits");
  }
  const words = [...list(modalities, "modalities", MODALITIES), ...(tools === undefined ? [] : [tools])];
  if (!words.every((word) => WORD.test(text(word, "a word")))) throw new TrustError("a word of a model is not of its form");
  return {
    sha256: digests,
    signers: ids,
    kind: kind !== undefined && KINDS.has(text(kind, "kind")) ? kind : null,
    context: optional(context, (value) => count(value, "context", 1, MOST)),
    maxOutput: optional(max_output, (value) => count(value, "max_output", 1, MOST)),
  };
}

/** The most tokens of one choice if the caller names no limit. @param {ModelEntry | undefined} entry */
export const outputOf = (entry) => entry?.maxOutput ?? Math.min(entry?.context ?? OUTPUT, OUTPUT);

/**
 * The pool's first current key of the first KEM that it has one for. kems: names, in the caller's order. now: seconds.
 * @param {Pool} pool @param {readonly string[]} kems @param {number} now @returns {PoolKey & { config: KeyConfiguration }}
 */
export function chooseKey(pool, kems, now) {
  for (const name of kems) {
    const found = pool.keys.find(({ config, notAfter }) => notAfter > now && config?.kem.name === name);
    if (found) return /** @type {PoolKey & { config: KeyConfiguration }} */ (found);
  }
  throw new NoUsableKeyError(`the pool offers no current key for ${kems.join(" or ")}`);
}
