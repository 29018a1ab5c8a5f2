/** Bytes, varints and base64url; and the ground on which both streaming readers stand. */

import { MalformedError, TooLargeError, TruncatedError, UsedError } from "./errors.mjs";

export const ascii = (text) => Uint8Array.from(Buffer.from(text, "latin1"));
export const latin1 = (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("latin1");

/** All parts in one array of its own: Node's buffers share memory, and what hpke-js is given must not. */
export function concat(...parts) {
  const all = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** `value` in `size` bytes, big-endian. */
export function uint(value, size) {
  const bytes = Buffer.alloc(size);
  bytes.writeUIntBE(value, 0, size);
  return Uint8Array.from(bytes);
}

/** QUIC's variable-length integer in its shortest form (RFC 9000 section 16). */
export function varint(value) {
  if (value < 0x40) return Uint8Array.of(value);
  if (value < 0x4000) return uint(value + 0x4000, 2);
  if (value < 0x40000000) return uint(value + 0x80000000, 4);
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value) | (3n << 62n));
  return Uint8Array.from(bytes);
}

/** The value of one whole varint; shortest or not, every form is legal. Above 2^53 it is only about right, and over every limit. */
function varintValue(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (bytes.length === 1) return bytes[0] & 0x3f;
  if (bytes.length === 2) return view.getUint16(0) & 0x3fff;
  if (bytes.length === 4) return view.getUint32(0) & 0x3fffffff;
  return Number(view.getBigUint64(0) & ((1n << 62n) - 1n));
}

/** base64url without padding (RFC 7515 section 2); null where `text` is not the one canonical form of its bytes. */
export function fromBase64url(text) {
  if (typeof text !== "string" || !/^[A-Za-z0-9_-]*$/.test(text)) return null;
  const bytes = Buffer.from(text, "base64url");
  return bytes.toString("base64url") === text ? Uint8Array.from(bytes) : null;
}

export const toBase64url = (bytes) => Buffer.from(bytes).toString("base64url");

/** Bytes that came in pieces and leave in others. */
class Queue {
  #parts = [];
  length = 0;

  push(bytes) {
    if (bytes.length === 0) return;
    this.#parts.push(bytes);
    this.length += bytes.length;
  }

  /** Exactly `size` bytes; the caller has seen that they are there. */
  take(size) {
    const taken = [];
    for (let missing = size; missing > 0; ) {
      const part = this.some(missing);
      taken.push(part);
      missing -= part.length;
    }
    return taken.length === 1 ? taken[0] : concat(...taken);
  }

  /** At least one byte and at most `limit`, without copying. */
  some(limit) {
    const first = this.#parts[0];
    const part = first.subarray(0, limit);
    if (part.length === first.length) this.#parts.shift();
    else this.#parts[0] = first.subarray(part.length);
    this.length -= part.length;
    return part;
  }
}

const MORE = Symbol("needs more bytes");

/**
 * Reads one message out of bytes as they arrive. `push` and `end` give back an iterator over what can be said by then; all that
 * came before an error is told before the error is thrown. After an error, or after its end, the object is used up.
 *
 * A subclass writes `*read()` as if all bytes were there: `yield* this.take(3)` waits for them, `yield thing` tells the caller.
 */
export class StreamReader {
  #queue = new Queue();
  #ended = false;
  #failed = false;
  #steps = this.read();

  push(bytes) {
    this.#alive();
    this.#queue.push(bytes);
    return this.#run();
  }

  /** No byte follows: the rest is told, and a message that is not whole is an error. */
  end() {
    this.#alive();
    this.#ended = true;
    return this.#run();
  }

  #alive() {
    if (this.#failed) throw new UsedError("this message has already failed");
    if (this.#ended) throw new UsedError("this message has already ended");
  }

  *#run() {
    for (;;) {
      let step;
      try {
        step = this.#steps.next();
      } catch (error) {
        this.#failed = true;
        throw error;
      }
      if (step.done || step.value === MORE) return;
      yield step.value;
    }
  }

  *take(size) {
    while (this.#queue.length < size) yield* this.more();
    return size === 0 ? new Uint8Array() : this.#queue.take(size);
  }

  /** Whether the message ends here. */
  *atEnd() {
    while (this.#queue.length === 0 && !this.#ended) yield MORE;
    return this.#queue.length === 0;
  }

  /** Between one byte and `limit`, as soon as there are any. */
  *some(limit) {
    while (this.#queue.length === 0) yield* this.more();
    return this.#queue.some(limit);
  }

  /** All up to the end, which is an error as soon as it is more than `limit`. */
  *rest(limit, what) {
    for (;;) {
      if (this.#queue.length > limit) throw new TooLargeError(`${what} is longer than ${limit} bytes`);
      if (this.#ended) return this.#queue.take(this.#queue.length);
      yield MORE;
    }
  }

  *varint() {
    const first = yield* this.take(1);
    const rest = yield* this.take((1 << (first[0] >> 6)) - 1);
    return varintValue(concat(first, rest));
  }

  /** A length, refused before anything of what it announces is waited for. */
  *lengthUpTo(limit, what) {
    const length = yield* this.varint();
    if (length > limit) throw new TooLargeError(`${what} of ${length} bytes, more than ${limit}`);
    return length;
  }

  *more() {
    if (this.#ended) throw new TruncatedError("the message ends before its end");
    yield MORE;
  }
}

/** Reads one structure out of bytes that are all there. */
export class SliceReader {
  #bytes;
  #at = 0;

  constructor(bytes) {
    this.#bytes = bytes;
  }

  get left() {
    return this.#bytes.length - this.#at;
  }

  take(size) {
    if (size > this.left) throw new MalformedError(`${size} bytes announced, ${this.left} there`);
    this.#at += size;
    return this.#bytes.subarray(this.#at - size, this.#at);
  }

  uint(size) {
    return this.take(size).reduce((value, byte) => value * 256 + byte, 0);
  }

  varint() {
    const first = this.take(1);
    return varintValue(concat(first, this.take((1 << (first[0] >> 6)) - 1)));
  }
}
