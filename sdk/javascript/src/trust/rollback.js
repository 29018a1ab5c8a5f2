/**
 * Is a manifest older than one seen before (docs/wire.md section 3, "Memory")? Memory belongs to a *lineage*: a root and its
 * successors. A remembered manifest is verified again before it is believed.
 */

import { RollbackError, TrustError } from "../errors.js";
import { equal } from "../wire/bytes.js";
import { Document, ledTo, unique, verifyDocument } from "./chain.js";
import { sameStatement } from "./manifest.js";

/** @typedef {import("./chain.js").Trusted} Trusted */
/** @typedef {{ pin: Uint8Array, roots: Uint8Array[], ver: number, document: Uint8Array }} Seen the newest manifest of a lineage */

const MAX_TRIED = 128; // remembered roots to try as those that led to the pinned one

/**
 * The manifest to use: the candidate, or one seen before; and what to remember then.
 * @param {Trusted} candidate @param {Seen[]} remembered @param {number} now seconds
 * @returns {Promise<{ chosen: Trusted, seen: Seen[] }>}
 */
export async function newest(candidate, remembered, now) {
  const lineage = await related(candidate, remembered);
  const chosen = await chosenOf(candidate, lineage, now);
  const roots = unique([...chosen.roots, ...lineage.flatMap((seen) => seen.roots)]);
  const pin = lineage.find((seen) => equal(seen.document, chosen.document))?.pin ?? chosen.roots[0];
  const kept = { pin, roots, ver: chosen.manifest.ver, document: chosen.document };
  return { chosen, seen: [kept, ...remembered.filter((seen) => !lineage.includes(seen))] };
}

/** @param {Trusted} candidate @param {Seen[]} lineage @param {number} now */
async function chosenOf(candidate, lineage, now) {
  for (const seen of [...lineage].sort((one, other) => other.ver - one.ver)) {
    const document = new Document(seen.document);
    if (candidate.manifest.ver === seen.ver && candidate.token !== document.token) {
      throw new RollbackError(`two manifests have the version ${seen.ver}`);
    }
    if (candidate.manifest.ver < seen.ver || !(await continues(candidate, seen, document))) {
      return again(seen, candidate.roots[0], now);
    }
  }
  return candidate;
}

/** Whether the candidate's chain holds the last statement that was followed, or begins after it. @param {Trusted} candidate @param {Seen} seen @param {Document} document */
async function continues(candidate, seen, document) {
  const { steps } = await document.follow(seen.pin);
  const last = steps[steps.length - 1];
  if (has(candidate.roots, last.root)) {
    return candidate.steps.some((step) => equal(step.root, last.root) && sameStatement(step.statement, last.statement));
  }
  return !has(seen.roots, candidate.roots[0]);
}

/** @param {Seen} seen @param {Uint8Array} pin @param {number} now */
async function again(seen, pin, now) {
  try {
    return await verifyDocument(seen.document, pin, now);
  } catch (cause) {
    if (!(cause instanceof TrustError)) throw cause;
    throw new RollbackError(`the gateway serves an older manifest than version ${seen.ver}, which is no longer valid`, { cause });
  }
}

/** @param {Trusted} candidate @param {Seen[]} remembered */
async function related(candidate, remembered) {
  const shares = remembered.filter((seen) => seen.roots.some((root) => has(candidate.roots, root)));
  const others = remembered.filter((seen) => !shares.includes(seen));
  const pin = candidate.roots[0];
  if (!others.length || !candidate.steps.some(({ statement }) => statement.nextRoot && equal(statement.nextRoot, pin))) return shares;
  const { chain } = await new Document(candidate.document).follow(pin);
  let tried = 0;
  const led = [];
  for (const seen of others) {
    const roots = seen.roots.slice(0, Math.max(MAX_TRIED - tried, 0));
    tried += roots.length;
    if (await ledTo(chain, pin, roots)) led.push(seen);
  }
  return [...shares, ...led];
}

/** @param {Uint8Array[]} keys @param {Uint8Array} key */
const has = (keys, key) => keys.some((each) => equal(each, key));

