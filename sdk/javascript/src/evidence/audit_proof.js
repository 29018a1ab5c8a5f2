/** The gateway's proof that it recorded the request (docs/wire.md section 12, docs/audit.md): an entry, its path, a checkpoint. */

import { InvalidAuditError } from "../errors.js";
import { verifies } from "../trust/ed25519.js";
import { concat, equal, fromBase64, sha256, utf8 } from "../wire/bytes.js";

const MAX_HEADER = 8192;
const MAX_PATH = 40; // hashes of an inclusion proof in the largest tree
const MAX_NOTE = 16384;
const HASH = 32;
const DASH = "— ";
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const INDEX = /^(?:0|[1-9][0-9]{0,14})$/;
const ORIGIN = /^[!-*,-~]{1,255}$/;

/** @typedef {{ entry: Record<string, any>, index: number, origin: string, size: number, header: string }} AuditProof */

/**
 * @param {string | null} header
 * @param {Uint8Array[]} keys the manifest's gateway keys; one of them signed
 * @param {Record<string, unknown>} expected members of the entry
 * @returns {Promise<AuditProof>}
 */
export async function proofOf(header, keys, expected) {
  if (!header) throw new InvalidAuditError("the answer has no proof that it was recorded");
  const { index, entry, path, note } = parseHeader(header);
  const checkpoint = await verifiedNote(note, keys);
  const root = await rootOf(await sha256(concat([Uint8Array.of(0), entry])), index, checkpoint.size, path);
  if (!root || !equal(root, checkpoint.root)) throw new InvalidAuditError("the audit proof does not lead from the entry to the root");
  const members = parseEntry(entry);
  for (const [name, value] of Object.entries(expected)) {
    if (members[name] === value) continue;
    const what = name === "enc" ? "this is the answer to another request" : `the gateway recorded another ${name} than was sent`;
    throw new InvalidAuditError(what);
  }
  return { entry: members, index, origin: checkpoint.origin, size: checkpoint.size, header };
}

/** A Dictionary of RFC 9651; unknown members are ignored. @param {string} header */
function parseHeader(header) {
  if (header.length > MAX_HEADER) throw new InvalidAuditError(`the Lacre-Audit header has over ${MAX_HEADER} characters`);
  const members = new Map(
    header.split(",").map((member) => {
      const [name, ...rest] = member.replace(/^[ \t]+|[ \t]+$/g, "").split("=");
      return [name, rest.join("=")];
    }),
  );
  const octets = (/** @type {string} */ name) => fromBase64(/^:([A-Za-z0-9+/=]*):$/.exec(members.get(name) ?? "")?.[1]);
  const [entry, path, note, index] = [octets("entry"), octets("path"), octets("checkpoint"), members.get("index") ?? ""];
  if (!entry || !path || !note || !INDEX.test(index) || path.length % HASH || path.length > MAX_PATH * HASH) {
    throw new InvalidAuditError("the Lacre-Audit header is malformed");
  }
  const hashes = Array.from({ length: path.length / HASH }, (_, i) => path.subarray(i * HASH, (i + 1) * HASH));
  return { index: Number(index), entry, path: hashes, note };
}

/** Readers would differ over an object that repeats a member, so the whole entry is compared with what was read. @param {Uint8Array} entry */
function parseEntry(entry) {
  try {
    const text = UTF8.decode(entry);
    const members = JSON.parse(text);
    if (members === null || typeof members !== "object" || Array.isArray(members)) throw new Error("not an object");
    if (namesIn(text) !== membersOf(members)) throw new Error("a member is there twice");
    return members;
  } catch (cause) {
    throw new InvalidAuditError("the audit entry is not a JSON object", { cause });
  }
}

/** How many members all objects of the text write. @param {string} text valid JSON */
function namesIn(text) {
  let names = 0;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === '"') for (i++; text[i] !== '"'; i++) i += text[i] === "\\" ? 1 : 0;
    else if (text[i] === ":") names += 1;
  }
  return names;
}

/** How many members all objects in a value have. @param {unknown} value */
function membersOf(value) {
  let count = 0;
  for (const left = [value]; left.length; ) {
    const each = left.pop();
    if (each === null || typeof each !== "object") continue;
    const inside = Object.values(each);
    count += Array.isArray(each) ? 0 : inside.length;
    for (const one of inside) left.push(one);
  }
  return count;
}

/** The checkpoint of a C2SP signed note, signed by one of the keys under the note's own origin. @param {Uint8Array} note @param {Uint8Array[]} keys */
async function verifiedNote(note, keys) {
  const { origin, size, root, text, signatures } = parseNote(note);
  for (const key of keys) {
    const id = (await sha256(concat([utf8(`${origin}\n`), Uint8Array.of(1), key]))).subarray(0, 4);
    // The key's first line counts: a note with a bad one is refused, whatever follows.
    const line = signatures.find(({ name, blob }) => name === origin && equal(blob.subarray(0, 4), id));
    if (line && (await verifies(key, line.blob.subarray(4), text))) return { origin, size, root };
  }
  throw new InvalidAuditError("the audit checkpoint is not signed by the gateway's key");
}

/** @param {Uint8Array} note */
function parseNote(note) {
  const fail = (/** @type {string} */ what) => new InvalidAuditError(`the audit checkpoint is malformed: ${what}`);
  if (note.length > MAX_NOTE) throw fail("too long");
  let whole;
  try {
    whole = UTF8.decode(note);
  } catch {
    throw fail("not UTF-8");
  }
  if (/[\x00-\x09\x0b-\x1f]/.test(whole)) throw fail("a control character");
  const at = whole.lastIndexOf("\n\n");
  const lines = whole.slice(at + 2).split("\n");
  if (at < 0 || lines.pop() !== "" || !lines.length) throw fail("no signatures");
  const signatures = lines.map((line) => {
    const [, name, encoded] = /^— ([^ ]*) (.*)$/.exec(line) ?? [];
    const blob = fromBase64(encoded);
    if (!blob) throw fail(`a line of signatures that does not begin with ${DASH}and hold base64`);
    return { name, blob };
  });
  const text = whole.slice(0, at + 1);
  const [origin, size, encoded, ...extensions] = text.slice(0, -1).split("\n");
  const root = fromBase64(encoded);
  if (!ORIGIN.test(origin) || !/^(?:0|[1-9][0-9]{0,15})$/.test(size ?? "") || Number(size) > 2 ** 40 || root?.length !== HASH) {
    throw fail("its lines are not origin, size and root");
  }
  if (extensions.includes("")) throw fail("an empty line");
  return { origin, size: Number(size), root, text: utf8(text), signatures };
}

/** RFC 9162 section 2.1.3.2; null if the path does not fit the tree. @param {Uint8Array} leaf @param {number} index @param {number} size @param {Uint8Array[]} path */
async function rootOf(leaf, index, size, path) {
  if (index >= size) return null;
  let [place, last, node] = [index, size - 1, leaf];
  const half = (/** @type {number} */ number) => Math.floor(number / 2);
  for (const sibling of path) {
    if (last === 0) return null;
    const right = place % 2 === 1 || place === last;
    node = await sha256(right ? concat([Uint8Array.of(1), sibling, node]) : concat([Uint8Array.of(1), node, sibling]));
    while (right && place % 2 === 0 && place > 0) [place, last] = [half(place), half(last)];
    [place, last] = [half(place), half(last)];
  }
  return last === 0 ? node : null;
}

/** The members of an entry that the bearer token itself names; none if this client cannot read it. @param {string} token */
export function speaksFor(token) {
  const { sub, iss } = claimsOf(token);
  const named = Object.entries({ subject: sub, issuer: iss });
  return Object.fromEntries(named.filter(([, value]) => typeof value === "string"));
}

/** The claims of a JWT, unverified: it is the client's own. @param {string} token @returns {Record<string, any>} */
function claimsOf(token) {
  const parts = token.split(".");
  const payload = parts.length === 3 ? parts[1].replaceAll("-", "+").replaceAll("_", "/") : "";
  try {
    const claims = JSON.parse(UTF8.decode(Uint8Array.from(atob(payload), (each) => each.charCodeAt(0))));
    return claims !== null && typeof claims === "object" ? claims : {};
  } catch {
    return {};
  }
}
