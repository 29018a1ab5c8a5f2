/**
 * One answer out of one or more sealed requests (docs/wire.md sections 11.2 and 14).
 *
 * - Text that the caller has is never taken back and never repeated. A new request resumes at exactly the tokens received, on the
 *   same model file, or not at all.
 * - An answer of which the caller has nothing begins again, if asking again does no harm.
 * - Only a truncated answer is resumed. One that was altered is an attack.
 */

import { InvalidReceiptError, LacreError, StreamBrokenError, TruncatedError } from "../errors.js";
import { valueOf } from "../wire/bhttp.js";
import { utf8 } from "../wire/bytes.js";
import { actionOf, isRepeatable } from "./inner.js";
import { jsonObject } from "./problems.js";
import { delay, ENDURANCE_RESUMING, mayHaveLost, MOST_LOST, waited } from "./retries.js";
import { Splice } from "./splice.js";

/** @typedef {import("./inner.js").Plain} Plain */
/** @typedef {import("./sealing.js").Sealing} Sealing */
/** @typedef {import("./sealing.js").Given} Given */
/** @typedef {import("./answer.js").SealedAnswer} SealedAnswer */

/** The request, with the wish for resume marks if its answer may be a stream that can be resumed. @param {Plain} plain @param {number} resume @returns {Plain} */
export function asking(plain, resume) {
  const body = resume > 0 && isRepeatable(plain) ? jsonObject(plain.content) : null;
  const headers = plain.headers.filter(([name]) => name !== "lacre-resume");
  if (body?.stream !== true || "resume" in body) return { ...plain, headers };
  return { ...plain, headers: [...headers, ["lacre-resume", "?1"]] };
}

export class ResumableAnswer {
  #sealing;
  #plain;
  #given;
  #answer;
  #digest;
  #name;
  /** @type {Splice | null} */
  #splice = null;
  #made = 0;
  #rest = ENDURANCE_RESUMING;
  #handed = false;

  /** @param {Sealing} sealing @param {Plain} plain @param {Given} given @param {{ answer: SealedAnswer, info: import("./sealing.js").Info }} first */
  constructor(sealing, plain, given, { answer, info }) {
    this.#sealing = sealing;
    this.#plain = plain;
    this.#given = { ...given, stays: { pool: info.parts[0].pool, model: info.parts[0].model } };
    this.#answer = answer;
    this.info = info;
    this.head = answer.head;
    this.#digest = valueOf(this.head.fields, "lacre-model-digest") ?? "";
    this.#name = valueOf(this.head.fields, "lacre-answer");
    const asked = plain.headers.some(([name]) => name === "lacre-resume");
    if (this.head.status === 200 && answer.mediaType === "text/event-stream") this.#splice = new Splice(asked && this.#digest !== "");
  }

  /** The content, whole if it ends. @returns {AsyncGenerator<Uint8Array>} */
  async *content() {
    for (;;) {
      try {
        yield* this.#pieces();
        return;
      } catch (error) {
        if (!(error instanceof TruncatedError) || this.#given.options.resume === 0) throw error;
        await this.#again(error);
      }
    }
  }

  discard() {
    return this.#answer.discard();
  }

  async *#pieces() {
    for await (const bytes of this.#answer.content()) {
      const ready = this.#splice ? this.#splice.feed(bytes) : bytes;
      if (ready.length === 0) continue;
      this.#handed = true;
      yield ready;
    }
    if (!this.#splice) return;
    const part = this.info.parts[this.info.parts.length - 1];
    if (this.#digest && part.receipt?.model !== this.#digest) {
      throw new InvalidReceiptError("the answer and its receipt name different model files");
    }
    if (this.#splice.failed && this.#continuation()) throw gaveUp("the worker gave up before the end of the answer");
    const streams = ["chat", "complete"].includes(actionOf(this.#plain));
    if (streams && !this.#splice.complete) throw gaveUp("the stream of events ends without its last event");
    const held = this.#splice.end();
    if (held.length) yield held;
  }

  /** A further request goes on with the answer, or begins it again. @param {TruncatedError} error */
  async #again(error) {
    this.info.lost += mayHaveLost(error) ? 1 : 0;
    const content = this.#continuation();
    if (!content) throw this.#broken(error.message, error);
    this.#made += 1;
    const began = performance.now();
    if (this.#made > 1) await waited(delay(this.#made - 1), this.#given.signal);
    this.#splice?.seam();
    let outcome;
    try {
      outcome = await this.#sealing.exchange({ ...this.#plain, content }, { ...this.#given, endurance: this.#rest, lost: this.info.lost });
    } catch (cause) {
      if (!(cause instanceof LacreError)) throw cause;
      throw this.#broken("the answer broke off, and the request to resume it failed", cause);
    }
    this.#rest -= (performance.now() - began) / 1000;
    this.#join(outcome);
  }

  /** @param {{ answer: SealedAnswer, info: import("./sealing.js").Info }} outcome */
  #join({ answer, info }) {
    this.info.attempts += info.attempts;
    this.info.lost = info.lost;
    this.info.parts.push(...info.parts);
    if (answer.head.status !== this.head.status || answer.mediaType !== this.#answer.mediaType) {
      throw this.#broken(`the answer broke off, and a worker refused to resume it (status ${answer.head.status})`);
    }
    if (this.#digest && valueOf(answer.head.fields, "lacre-model-digest") !== this.#digest) {
      throw this.#broken("the answer broke off, and the next worker has another model file");
    }
    this.#name = valueOf(answer.head.fields, "lacre-answer"); // a new one if the answer began again
    this.#answer = answer;
  }

  /** The body of the request that resumes the answer or begins it again; null if neither is possible. */
  #continuation() {
    if (this.#made >= this.#given.options.resume || this.info.lost >= MOST_LOST || this.#rest <= 0) return null;
    if (this.#splice?.tokens.length) {
      if (!this.#splice.open) return null;
      const resume = { digest: this.#digest, ...(this.#name ? { answer: this.#name } : {}), tokens: this.#splice.tokens };
      return utf8(JSON.stringify({ ...jsonObject(this.#plain.content), resume }));
    }
    return !this.#handed && isRepeatable(this.#plain) ? this.#plain.content : null;
  }

  /** @param {string} message @param {unknown} [cause] */
  #broken(message, cause) {
    const broken = new StreamBrokenError(message, { cause });
    broken.tokens = this.#splice?.tokens.length ?? 0;
    return broken;
  }
}

/** A whole answer, in which the worker itself says that it is not: no worker was lost. @param {string} message */
function gaveUp(message) {
  const error = new TruncatedError(message);
  error.cut = true;
  return error;
}
