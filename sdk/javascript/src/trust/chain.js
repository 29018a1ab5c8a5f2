/**
 * Is it trusted? Decides from bytes and a time, and throws; fetches and stores nothing (docs/wire.md section 3).
 *
 * The server of a document may be hostile, so the work that it can cause is bounded: the search for the pinned root's first
 * statement looks where an honest chain has it, and then at few others.
 */

import { ExpiredError, TrustError, UntrustedRootError } from "../errors.js";
import { equal, toBase64url } from "../wire/bytes.js";
import { list, object, ofVersionOne, parseJson, text } from "./json.js";
import { Jws, verifiedClaims } from "./jws.js";
import { readManifest, readStatement } from "./manifest.js";

export const MAX_DOCUMENT = 1024 * 1024;
const MAX_ROOTS = 1000;
const MAX_STATEMENT = 4096; // characters
const MAX_CLOCK_SKEW = 300; // seconds
const MAX_FOREIGN = 32; // statements of other roots that are tried in search of the first of the pinned root
const MAX_CLAIMS = 4; // statements that name one root as the next; an honest chain has one
const MAX_HANDOVERS = 32; // changes of root to follow back

/** @typedef {import("./manifest.js").RootStatement} RootStatement */
/** @typedef {{ root: Uint8Array, statement: RootStatement }} Step root: the one after the statement */
/** @typedef {{ manifest: import("./manifest.js").Manifest, token: string, steps: Step[], roots: Uint8Array[], document: Uint8Array }} Trusted */

/** Seconds since the epoch, by this machine's clock alone. */
export const clock = () => Date.now() / 1000;

/** @param {string} token */
const parsed = (token) => new Jws(token, "lacre-root+jwt", MAX_STATEMENT);

/** One entry of `roots`: one token, or two of the same payload. Each is parsed if it is needed, and checked with each key once. */
class Entry {
  /** @type {Map<string, Promise<RootStatement | null>>} */
  #known = new Map();
  /** @type {Uint8Array | null | undefined} */
  #claimed;

  /** @param {any} tokens */
  constructor(tokens) {
    this.tokens = list(tokens, "an entry of roots", 2).map((token) => text(token, "a token"));
    if (this.tokens.length < 1) throw new TrustError("an entry of roots is empty");
  }

  /** The root that a change of root names, unverified: it says only where to look. @returns {Uint8Array | null} */
  get claim() {
    if (this.#claimed === undefined) this.#claimed = this.#claim();
    return this.#claimed;
  }

  /** Whether all tokens have the same payload. */
  get isOne() {
    const [first, ...others] = this.tokens.map((token) => parsed(token).payload);
    return others.every((payload) => equal(payload, first));
  }

  #claim() {
    if (this.tokens.length < 2) return null;
    try {
      return readStatement(parsed(this.tokens[0]).claims("a root statement")).nextRoot;
    } catch (error) {
      if (error instanceof TrustError) return null;
      throw error;
    }
  }

  /** The statement if one of its tokens is by `root`. @param {Uint8Array} root */
  by(root) {
    const name = toBase64url(root);
    const known = this.#known.get(name) ?? this.#verified(root);
    this.#known.set(name, known);
    return known;
  }

  /** @param {Uint8Array} root */
  async #verified(root) {
    for (const jws of this.tokens.map(parsed)) {
      if (await jws.isBy(root)) return readStatement(jws.claims("a root statement"));
    }
    return null;
  }
}

/** A parsed document. Each chain is parsed once, and its signatures are remembered. */
export class Document {
  /** @param {Uint8Array} bytes */
  constructor(bytes) {
    if (bytes.length > MAX_DOCUMENT) throw new TrustError("a manifest document has more than 1 MiB");
    const what = "the manifest document";
    const { roots, beside, manifest } = ofVersionOne(object(parseJson(bytes, what), what), what);
    this.bytes = bytes;
    this.token = manifest;
    this.chains = [chainOf(roots), ...(beside === undefined ? [] : [chainOf(beside)])];
  }

  /** From the pinned root: by `roots` if it leads that chain, else by `beside`. @param {Uint8Array} pinned */
  async follow(pinned) {
    const [roots, beside] = this.chains;
    try {
      return { chain: roots, steps: await follow(roots, pinned) };
    } catch (error) {
      if (beside === undefined || !(error instanceof UntrustedRootError)) throw error;
      return { chain: beside, steps: await follow(beside, pinned) };
    }
  }
}

/** @param {any} entries */
function chainOf(entries) {
  const chain = list(entries, "roots", MAX_ROOTS).map((entry) => new Entry(entry));
  if (chain.length < 1) throw new TrustError("the chain of roots is empty");
  return chain;
}

/** @param {Uint8Array} bytes @param {Uint8Array} root the pinned one @param {number} now seconds @returns {Promise<Trusted>} */
export async function verifyDocument(bytes, root, now) {
  const document = new Document(bytes);
  const { steps } = await document.follow(root);
  const last = steps[steps.length - 1].statement;
  if (last.exp <= now) throw new ExpiredError("the root's last statement has expired");
  const manifest = readManifest(await verifiedClaims(document.token, "lacre-manifest+jwt", last.signer));
  if (manifest.exp <= now) throw new ExpiredError("the manifest has expired");
  if (manifest.iat > now + MAX_CLOCK_SKEW) throw new ExpiredError("the manifest is from the future");
  return { manifest, token: document.token, steps, roots: unique([root, ...steps.map((step) => step.root)]), document: bytes };
}

/** @param {Uint8Array[]} keys */
export const unique = (keys) => [...new Map(keys.map((key) => [toBase64url(key), key])).values()];

/** The statements from the pinned root on. @param {Entry[]} chain @param {Uint8Array} pinned @returns {Promise<Step[]>} */
export async function follow(chain, pinned) {
  let root = pinned;
  /** @type {Step[]} */
  const steps = [];
  for (const entry of chain.slice(await firstOf(chain, pinned))) {
    const statement = await entry.by(root);
    if (!statement) throw new UntrustedRootError("the chain of roots has a gap");
    const next = statement.nextRoot;
    if (next && !equal(next, root)) {
      if (!entry.isOne || !(await entry.by(next))) throw new UntrustedRootError("the next root has not signed its own statement");
      root = next;
    }
    steps.push({ root, statement });
  }
  return steps;
}

/** The index of the pinned root's first statement. @param {Entry[]} chain @param {Uint8Array} pinned */
async function firstOf(chain, pinned) {
  for (const index of [...naming(chain, pinned), 0]) if (await chain[index].by(pinned)) return index;
  let start = chain.length;
  while (start > 0 && (await chain[start - 1].by(pinned))) start -= 1;
  if (start < chain.length) return start;
  for (const [index, entry] of chain.slice(0, MAX_FOREIGN).entries()) if (await entry.by(pinned)) return index;
  throw new UntrustedRootError("no statement is by the pinned root");
}

/** The first entries that name `root` as the next one. @param {Entry[]} chain @param {Uint8Array} root */
function naming(chain, root) {
  const found = [];
  for (let i = 0; i < chain.length && found.length < MAX_CLAIMS; i++) {
    const claim = chain[i].claim;
    if (claim && equal(claim, root)) found.push(i);
  }
  return found;
}

/**
 * Whether the chain leads from `old` to `root`: goes back from `root`, and verifies only the statements that name it.
 * @param {Entry[]} chain @param {Uint8Array} root @param {Uint8Array[]} olds @returns {Promise<boolean>}
 */
export async function ledTo(chain, root, olds) {
  let at = chain.length;
  let current = root;
  for (let handovers = 0; handovers < MAX_HANDOVERS; handovers++) {
    let index = -1;
    for (const named of naming(chain.slice(0, at), current)) {
      if (index < 0 && (await chain[named].by(current))) index = named;
    }
    if (index < 0) return false;
    for (const old of olds) if (!equal(old, current) && (await chain[index].by(old))) return true;
    const before = chain.slice(0, index).map((entry) => entry.claim).filter((claim) => claim !== null).pop();
    if (!before || !(await chain[index].by(before))) return false;
    [current, at] = [before, index];
  }
  return false;
}
