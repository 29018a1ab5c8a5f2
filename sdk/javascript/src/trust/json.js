/** Members of signed JSON, each of the form that docs/wire.md gives it. Everything else is a TrustError. */

import { NewerFormatError, TrustError } from "../errors.js";
import { fromBase64url } from "../wire/bytes.js";

const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** @param {Uint8Array} bytes @param {string} what @returns {any} */
export function parseJson(bytes, what) {
  try {
    return JSON.parse(UTF8.decode(bytes));
  } catch (cause) {
    throw new TrustError(`${what} is not JSON`, { cause });
  }
}

/** @param {any} value @param {string} what @returns {Record<string, any>} */
export function object(value, what) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new TrustError(`${what} is not an object`);
  return value;
}

/** @param {any} value @param {string} what @param {number} [most] @returns {any[]} */
export function list(value, what, most = Infinity) {
  if (!Array.isArray(value)) throw new TrustError(`${what} is not a list`);
  if (value.length > most) throw new TrustError(`${what} has more than ${most} entries`);
  return value;
}

/** @param {any} value @param {string} what @returns {string} */
export function text(value, what) {
  if (typeof value !== "string") throw new TrustError(`${what} is not text, or is missing`);
  return value;
}

/** @param {any} value @param {string} what @returns {number} */
export function time(value, what) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new TrustError(`${what} is not a time, or is missing`);
  return value;
}

/** @param {any} value @param {string} what @param {number} [least] @param {number} [most] @returns {number} */
export function count(value, what, least = 0, most = Number.MAX_SAFE_INTEGER) {
  if (!Number.isSafeInteger(value) || value < least || value > most) throw new TrustError(`${what} is not a number in its range`);
  return value;
}

/** @param {any} value @param {string} what @returns {Uint8Array} */
export function key32(value, what) {
  const key = fromBase64url(value);
  if (key?.length !== 32) throw new TrustError(`${what} is not 32 bytes of base64url, or is missing`);
  return key;
}

/**
 * Refuses a later version of a format, whole: its member `v`, which may be missing and then is 1 (docs/upgrades.md).
 * @param {Record<string, any>} value @param {string} what @returns {Record<string, any>}
 */
export function ofVersionOne(value, what) {
  const { v = 1 } = value;
  if (count(v, `the version of ${what}`, 1) > 1) throw new NewerFormatError(`${what} is in version ${v} of its format, and this package reads up to 1`);
  return value;
}

/** @template T @param {any} value @param {(value: any) => T} read @returns {T | null} null if the member is missing */
export const optional = (value, read) => (value === undefined ? null : read(value));
