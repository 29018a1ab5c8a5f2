/** QUIC's variable-length integers (RFC 9000 section 16). */

import { uint } from "./bytes.js";

/** The shortest form. @param {number} value */
export function varint(value) {
  if (value < 0x40) return Uint8Array.of(value);
  if (value < 0x4000) return uint(value + 0x4000, 2);
  if (value < 0x40000000) return uint(value + 0x80000000, 4);
  const bytes = uint(value, 8);
  bytes[0] |= 0xc0;
  return bytes;
}

/** How many bytes follow the first one. @param {number} first */
export const bytesAfter = (first) => (1 << (first >> 6)) - 1;

/**
 * The value of one whole varint; every form is legal. Above 2^53 it is about right, and over every limit.
 * @param {Uint8Array} bytes
 */
export function varintValue(bytes) {
  return bytes.reduce((value, byte, i) => (i === 0 ? byte & 0x3f : value * 256 + byte), 0);
}
