/** Readers of one message: of bytes as they arrive, and of bytes that are all there. */

import { MalformedError, TooLargeError, TruncatedError, UsedError } from "../errors.js";
import { concat } from "./bytes.js";
import { bytesAfter, varintValue } from "./varint.js";

/** Bytes that came in pieces and leave in others. */
class Queue {
  /** @type {Uint8Array[]} */
  #parts = [];
  length = 0;

  /** @param {Uint8Array} bytes */
  push(bytes) {
    if (bytes.length === 0) return;
    this.#parts.push(bytes);
    this.length += bytes.length;
  }

  /** Exactly `size` bytes; the caller has seen that they are there. @param {number} size */
  take(size) {
    const taken = [];
    for (let missing = size; missing > 0; ) {
      const part = this.some(missing);
      taken.push(part);
      missing -= part.length;
    }
    return taken.length === 1 ? taken[0] : concat(taken);
  }

  /** At least one byte and at most `limit`, without a copy. @param {number} limit */
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
 * Reads one message from bytes as they arrive. `push` and `end` return an iterator over what can be said by then; all that came
 * before an error is told before the error is thrown. After an error, or after its end, the object is used up.
 *
 * A subclass writes `*read()` as if all bytes were there: `yield* this.take(3)` waits for them, `yield thing` tells the caller.
 */
export class StreamReader {
  #queue = new Queue();
  #ended = false;
  #failed = false;
  /** @type {Iterator<any, any, any>} */
  #steps = this.read();

  /** @returns {Generator<any, any, any>} */
  *read() {}

  /** @param {Uint8Array} bytes */
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

  /** @param {number} size @returns {Generator<any, Uint8Array, any>} */
  *take(size) {
    while (this.#queue.length < size) yield* this.more();
    return size === 0 ? new Uint8Array() : this.#queue.take(size);
  }

  /** Whether the message ends here. @returns {Generator<any, boolean, any>} */
  *atEnd() {
    while (this.#queue.length === 0 && !this.#ended) yield MORE;
    return this.#queue.length === 0;
  }

  /** Between one byte and `limit`, as soon as there are any. @param {number} limit @returns {Generator<any, Uint8Array, any>} */
  *some(limit) {
    while (this.#queue.length === 0) yield* this.more();
    return this.#queue.some(limit);
  }

  /**
   * All up to the end, which is an error as soon as it is more than `limit`.
   * @param {number} limit @param {string} what @returns {Generator<any, Uint8Array, any>}
   */
  *rest(limit, what) {
    for (;;) {
      if (this.#queue.length > limit) throw new TooLargeError(`${what} is longer than ${limit} bytes`);
      if (this.#ended) return this.#queue.take(this.#queue.length);
      yield MORE;
    }
  }

  /** @returns {Generator<any, number, any>} */
  *varint() {
    const first = yield* this.take(1);
    const rest = yield* this.take(bytesAfter(first[0]));
    return varintValue(concat([first, rest]));
  }

  /**
   * A length, refused before anything of what it announces is waited for.
   * @param {number} limit @param {string} what @returns {Generator<any, number, any>}
   */
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

/** Reads one structure from bytes that are all there. */
export class SliceReader {
  #bytes;
  #at = 0;

  /** @param {Uint8Array} bytes */
  constructor(bytes) {
    this.#bytes = bytes;
  }

  get left() {
    return this.#bytes.length - this.#at;
  }

  /** @param {number} size */
  take(size) {
    if (size > this.left) throw new MalformedError(`${size} bytes are announced, and ${this.left} are there`);
    this.#at += size;
    return this.#bytes.subarray(this.#at - size, this.#at);
  }

  /** @param {number} size */
  uint(size) {
    return this.take(size).reduce((value, byte) => value * 256 + byte, 0);
  }

  varint() {
    const first = this.take(1);
    return varintValue(concat([first, this.take(bytesAfter(first[0]))]));
  }
}
