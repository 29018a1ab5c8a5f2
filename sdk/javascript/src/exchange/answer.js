/** One sealed answer: opens its records, reads the Binary HTTP in them, and verifies its end. */

import { MalformedError, NetworkError, TooLargeError, TruncatedError } from "../errors.js";
import { ResponseReader, valueOf } from "../wire/bhttp.js";
import { concat } from "../wire/bytes.js";
import { jsonObject, MAX_PROBLEM, mediaType, PROBLEM } from "./problems.js";

/** @typedef {import("../wire/bhttp.js").Field} Field */

export class SealedAnswer {
  #response;
  #opener;
  #verify;
  #signal;
  #aborted;
  #reading = new ResponseReader();
  #parts;
  /** Content that was read with the head. @type {Uint8Array[]} */
  #early = [];
  /** @type {Field[]} */
  #trailers = [];
  /** @type {{ status: number, fields: Field[] }} */
  head = { status: 0, fields: [] };
  /** The type of a problem that an authentic worker told; null if the answer is none. @type {string | null} */
  problemType = null;

  /**
   * @param {Response} response @param {import("../wire/ohttp.js").ResponseOpener} opener
   * @param {(head: { status: number }, trailers: Field[]) => Promise<void>} verify throws unless the receipt is one for this answer
   * @param {AbortSignal | undefined} signal
   */
  constructor(response, opener, verify, signal) {
    this.#response = response;
    this.#opener = opener;
    this.#verify = verify;
    this.#signal = signal;
    this.#aborted = abortOf(signal);
    this.#parts = this.#read();
  }

  get mediaType() {
    return mediaType(valueOf(this.head.fields, "content-type"));
  }

  /** Reads up to the head; of a problem, all of it. */
  async begin() {
    for (;;) {
      const { done, value: part } = await this.#parts.next();
      if (done) throw new MalformedError("the answer has no head");
      if (part.kind !== "head") continue; // informational
      this.head = part;
      break;
    }
    if (this.head.status !== 400 || this.mediaType !== PROBLEM) return;
    let size = 0;
    const parts = [];
    for await (const bytes of this.content()) {
      size += bytes.length;
      if (size > MAX_PROBLEM) throw new TooLargeError(`a problem document of more than ${MAX_PROBLEM} bytes`);
      parts.push(bytes);
    }
    const type = jsonObject(concat(parts))?.type;
    [this.#early, this.problemType] = [parts, typeof type === "string" ? type : null];
  }

  /** The content as it arrives. It ends only if the whole answer came and its receipt holds. @returns {AsyncGenerator<Uint8Array>} */
  async *content() {
    if (this.#early.length) {
      yield* this.#early;
      return;
    }
    for await (const part of this.#parts) {
      if (part.kind === "content") yield part.bytes;
      else if (part.kind === "trailers") this.#trailers = part.fields;
    }
    await this.#verify(this.head, this.#trailers);
  }

  async discard() {
    await this.#parts.return(undefined);
  }

  /** @returns {AsyncGenerator<any>} */
  async *#read() {
    const reader = this.#response.body?.getReader();
    try {
      for (;;) {
        const { done, value } = reader ? await this.#next(reader) : { done: true, value: undefined };
        const records = done || !value ? this.#opener.end() : this.#opener.push(value);
        for await (const record of records) yield* this.#reading.push(record);
        if (done) break;
      }
      yield* this.#reading.end();
    } finally {
      reader?.cancel().catch(() => undefined); // not awaited, for the same reason; a broken connection has nothing to cancel
    }
  }

  /** @param {ReadableStreamDefaultReader<Uint8Array>} reader */
  async #next(reader) {
    try {
      // Node 20 may leave a read pending for ever after its fetch was aborted.
      return await (this.#aborted ? Promise.race([reader.read(), this.#aborted]) : reader.read());
    } catch (cause) {
      this.#signal?.throwIfAborted();
      const broken = new TruncatedError("the connection broke inside the answer", { cause });
      broken.cut = true;
      throw broken;
    }
  }
}

/** Rejects once the signal aborts; null without a signal. @param {AbortSignal | undefined} signal @returns {Promise<never> | null} */
function abortOf(signal) {
  if (!signal) return null;
  /** @type {Promise<never>} */
  const aborted = new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    else signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  aborted.catch(() => undefined); // whoever waits hears of it
  return aborted;
}

/** One exchange with the gateway: no redirect is followed, and no cookie or referrer is sent. */
export async function exchanged(/** @type {typeof fetch} */ outer, /** @type {URL} */ url, /** @type {RequestInit} */ init) {
  try {
    return await outer(url, { redirect: "manual", credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer", ...init });
  } catch (cause) {
    init.signal?.throwIfAborted();
    throw new NetworkError(`no answer from ${url.host}`, { cause });
  }
}
