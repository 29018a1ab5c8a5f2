/**
 * Ed25519 with one answer in every program (docs/wire.md section 3): keys and first halves of signatures that are points of small
 * order, or points in a second spelling, are refused before WebCrypto is asked. Under such a key one signature fits many messages.
 */

const P = 2n ** 255n - 19n;
const Y = 2n ** 255n - 1n; // a point is its y, and above it the sign of x
const EIGHTH = 0x7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7n; // the y of a point of order 8
const SMALL_ORDER = new Set([0n, 1n, P - 1n, EIGHTH, P - EIGHTH]);

/** @param {Uint8Array} point */
export function isWeak(point) {
  const y = point.reduceRight((value, byte) => value * 256n + BigInt(byte), 0n) & Y;
  return y >= P || SMALL_ORDER.has(y);
}

/** @param {Uint8Array} key @param {Uint8Array} signature @param {Uint8Array} data @returns {Promise<boolean>} */
export async function verifies(key, signature, data) {
  if (key.length !== 32 || signature.length !== 64 || isWeak(key) || isWeak(signature.subarray(0, 32))) return false;
  const [raw, signed, over] = /** @type {BufferSource[]} */ ([key, signature, data]);
  let imported;
  try {
    imported = await crypto.subtle.importKey("raw", raw, "Ed25519", false, ["verify"]);
  } catch (error) {
    if (error instanceof DOMException && error.name === "NotSupportedError") throw error; // no program's fault but this engine's
    return false; // the bytes are no key
  }
  return crypto.subtle.verify("Ed25519", imported, signed, over);
}
