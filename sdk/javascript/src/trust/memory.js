/**
 * Where the newest manifests are remembered. A store has a number, `generation`, and replaces its content only if nobody else did
 * so meanwhile: so two programs, or two tabs, never overwrite what the other one saw.
 */

import { ConfigurationError, LacreError } from "../errors.js";
import { fromBase64url, randomBytes, toBase64url } from "../wire/bytes.js";
import { clock, verifyDocument } from "./chain.js";
import { newest } from "./rollback.js";

/** @typedef {import("./rollback.js").Seen} Seen */
/**
 * @typedef {object} Memory
 * @property {() => Promise<{ generation: number, text: string | null }>} read null: nothing is stored yet
 * @property {(generation: number, text: string) => Promise<boolean>} replace false: another one was quicker. generation: the read one
 */

const TRIES = 16;
const MAX_STORED = 64 * 2 ** 20; // characters: documents of the largest size for some forty lineages

/** Remembers in this process alone: then only the manifest's expiry limits a rollback after a restart. */
export class ProcessMemory {
  #generation = 0;
  /** @type {string | null} */
  #text = null;

  async read() {
    return { generation: this.#generation, text: this.#text };
  }

  /** @param {number} generation @param {string} text */
  async replace(generation, text) {
    if (generation !== this.#generation) return false;
    [this.#generation, this.#text] = [generation + 1, text];
    return true;
  }
}

/** IndexedDB in a browser, else a file of this user. Deno, Bun and Node have the same files. @returns {Promise<Memory>} */
export async function defaultMemory() {
  if (typeof indexedDB !== "undefined") return new (await import("./memory_indexeddb.js")).IndexedDbMemory();
  return (await import("./memory_file.js")).FileMemory.default();
}

/**
 * Verifies a document against the pinned root and the manifests seen before, and remembers the newer one.
 * @param {Uint8Array} bytes @param {Uint8Array} root @param {Memory} memory @param {number} [now] seconds
 * @returns {Promise<{ trusted: import("./chain.js").Trusted, routeKey: Uint8Array }>}
 */
export async function accept(bytes, root, memory, now = clock()) {
  const candidate = await verifyDocument(bytes, root, now);
  for (let tries = 0; tries < TRIES; tries++) {
    const { generation, text } = await memory.read();
    const { seen, routeKey } = parse(text);
    const decided = await newest(candidate, seen, now);
    const after = written(decided.seen, routeKey);
    if (after === text || (await memory.replace(generation, after))) return { trusted: decided.chosen, routeKey };
  }
  throw new ConfigurationError("other programs replace the remembered manifests all the time: end them");
}

/** @param {string | null} text @returns {{ seen: Seen[], routeKey: Uint8Array }} */
function parse(text) {
  if (text === null) return { seen: [], routeKey: randomBytes(32) };
  try {
    if (text.length > MAX_STORED) throw new Error("too long");
    const { version, route_key, seen } = JSON.parse(text);
    if (version !== 1) throw new Error("of another version");
    return { seen: seen.map(parseSeen), routeKey: octets(route_key) };
  } catch (cause) {
    if (cause instanceof LacreError) throw cause;
    // Never forget silently: who can damage the store must not gain a rollback by that.
    const remedy = "Remove it if you know why; the next manifest counts as the first.";
    throw new ConfigurationError("the store of remembered manifests is damaged", { cause, remedy });
  }
}

/** @param {any} value @returns {Seen} */
const parseSeen = ({ pin, roots, ver, document }) => ({
  pin: octets(pin),
  roots: roots.map(octets),
  ver: Number(ver),
  document: octets(document),
});

/** @param {unknown} text */
function octets(text) {
  const bytes = fromBase64url(text);
  if (!bytes) throw new Error("not base64url");
  return bytes;
}

/** @param {Seen[]} seen @param {Uint8Array} routeKey */
function written(seen, routeKey) {
  const form = seen.map(({ pin, roots, ver, document }) => ({
    pin: toBase64url(pin),
    roots: roots.map(toBase64url).sort(),
    ver,
    document: toBase64url(document),
  }));
  form.sort((one, other) => (one.roots[0] < other.roots[0] ? -1 : 1));
  return JSON.stringify({ version: 1, route_key: toBase64url(routeKey), seen: form });
}
