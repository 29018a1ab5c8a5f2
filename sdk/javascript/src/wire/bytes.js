/** Bytes and texts, by what browsers and servers have in common. */

export const NONE = new Uint8Array();
const MANY = 8192; // arguments of one call of `fromCharCode`

/** @param {string} text of Latin-1 @returns {Uint8Array<ArrayBuffer>} */
export function ascii(text) {
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** @param {Uint8Array} bytes */
export function latin1(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += MANY) text += String.fromCharCode(...bytes.subarray(at, at + MANY));
  return text;
}

const UTF8 = new TextEncoder();
/** @param {string} text @returns {Uint8Array<ArrayBuffer>} */
export const utf8 = (text) => /** @type {Uint8Array<ArrayBuffer>} */ (UTF8.encode(text));

/** All parts in one array of its own. @param {Uint8Array[]} parts as one argument: an engine takes few of them @returns {Uint8Array<ArrayBuffer>} */
export function concat(parts) {
  const all = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** `value` in `size` bytes, big-endian. @param {number} value @param {number} size */
export function uint(value, size) {
  const bytes = new Uint8Array(size);
  for (let i = size - 1, rest = value; i >= 0; i--, rest = Math.floor(rest / 256)) bytes[i] = rest % 256;
  return bytes;
}

/** Public values alone: this takes no care of time. @param {Uint8Array} one @param {Uint8Array} other */
export const equal = (one, other) => one.length === other.length && one.every((byte, i) => byte === other[i]);

/** @param {Uint8Array} bytes */
export const toHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {Uint8Array} bytes */
export const toBase64 = (bytes) => btoa(latin1(bytes));

/** RFC 4648 section 4; null unless `text` is the one canonical form of its bytes. @param {unknown} text */
export function fromBase64(text) {
  if (typeof text !== "string" || text.length % 4 !== 0 || !/^[A-Za-z0-9+/]*={0,2}$/.test(text)) return null;
  let bytes;
  try {
    bytes = ascii(atob(text));
  } catch {
    return null; // "=" where nothing is to be filled
  }
  return toBase64(bytes) === text ? bytes : null;
}

/** @param {Uint8Array} bytes */
export const toBase64url = (bytes) => toBase64(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

/** RFC 7515 section 2; null unless `text` is the one canonical form of its bytes. @param {unknown} text */
export function fromBase64url(text) {
  if (typeof text !== "string" || !/^[A-Za-z0-9_-]*$/.test(text) || text.length % 4 === 1) return null;
  return fromBase64(text.replaceAll("-", "+").replaceAll("_", "/") + "=".repeat((4 - (text.length % 4)) % 4));
}

/** @param {Uint8Array} bytes @returns {Promise<Uint8Array<ArrayBuffer>>} */
export const sha256 = async (bytes) =>
  new Uint8Array(await crypto.subtle.digest("SHA-256", /** @type {Uint8Array<ArrayBuffer>} */ (bytes)));

/** @param {number} size */
export const randomBytes = (size) => crypto.getRandomValues(new Uint8Array(size));
