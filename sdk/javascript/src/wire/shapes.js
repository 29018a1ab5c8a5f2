/** How a request's length is hidden (docs/wire.md section 11.1). */

import { concat } from "./bytes.js";

const LEAST = 4096;
const MOST = 7323648; // 447 full chunks, the most that stay below 7 MiB when sealed

export const SHAPES = /** @type {const} */ (["pad", "none"]);

/** @param {number} length */
export function bucket(length) {
  let size = LEAST;
  while (size < length) size += Math.floor((size * 12) / 100);
  return size;
}

/** The message with the zeros that its shape asks for. @param {Uint8Array} message @param {string} shape */
export function shaped(message, shape) {
  if (shape === "none") return message;
  return concat([message, new Uint8Array(Math.max(Math.min(bucket(message.length), MOST) - message.length, 0))]);
}
