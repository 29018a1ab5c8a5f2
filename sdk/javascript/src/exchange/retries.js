/**
 * Whether to send a request again before any of its answer was passed on, and when (docs/wire.md section 14). It neither waits nor
 * sends.
 *
 * - What certainly did not run is tried again for up to 30 s. What may have run is tried again twice, if that harms nothing.
 * - A request that may have ended a worker goes to one more, and to no third.
 */

import { NetworkError, TruncatedError } from "../errors.js";
import { AWAY, UNCLAIMED, WORKER_LOST } from "./problems.js";

const FIRST = 0.5; // seconds, of which a random part is waited
const LONGEST = 8;
const PATIENCE = 10; // seconds of Retry-After that the client waits without asking
const TRIES = 2;
const MOST = 8; // tries within the endurance
export const MOST_LOST = 2;
export const ENDURANCE = 30; // seconds
export const ENDURANCE_RESUMING = 15;

/** Seconds before this retry; the first is number 1. @param {number} number @param {number} [least] */
export const delay = (number, least = 0) => least + Math.random() * Math.min(FIRST * 2 ** (number - 1), LONGEST);

/** @param {unknown} error */
export const mayHaveLost = (error) => error instanceof TruncatedError && !error.cut;

const now = () => performance.now() / 1000;

export class Retries {
  #left;
  #endures;
  #repeatable;
  #until;
  #made = 0;
  #endured = 0;

  /** @param {{ number: number | null, repeatable: boolean, endurance?: number, lost?: number }} given number: null for the default */
  constructor({ number, repeatable, endurance = ENDURANCE, lost = 0 }) {
    this.#left = number ?? TRIES;
    this.#endures = number === null && endurance > 0;
    this.#repeatable = repeatable;
    this.#until = now() + endurance;
    this.lost = lost;
  }

  /** Seconds to wait after no answer came; null: do not retry. @param {NetworkError | TruncatedError} error */
  afterFailure(error) {
    this.lost += mayHaveLost(error) ? 1 : 0;
    return this.#repeatable && this.lost < MOST_LOST ? this.#next(0, false) : null;
  }

  /** Seconds to wait after a refusal; null: do not retry. @param {import("../errors.js").ProblemError} problem */
  afterProblem({ type, status, retryAfter }) {
    this.lost += type === WORKER_LOST || type === UNCLAIMED ? 1 : 0;
    const neverRan = AWAY.has(type) || type === UNCLAIMED || status === 429;
    const may = (neverRan || (type === WORKER_LOST && this.#repeatable)) && this.lost < MOST_LOST;
    return may && (retryAfter ?? 0) <= PATIENCE ? this.#next(retryAfter ?? 0, AWAY.has(type)) : null;
  }

  /** @param {number} least @param {boolean} endure */
  #next(least, endure) {
    if (endure && this.#endures) {
      if (this.#endured >= (now() < this.#until ? MOST : TRIES)) return null;
      this.#endured += 1;
    } else if (this.#left > 0) this.#left -= 1;
    else return null;
    this.#made += 1;
    return delay(this.#made, least);
  }
}

/**
 * What the work comes to, or a NetworkError after so many seconds. Then its signal aborts, and nobody waits for it any longer.
 * @template T @param {number} seconds @param {string} what @param {(signal: AbortSignal) => Promise<T>} work @returns {Promise<T>}
 */
export async function within(seconds, what, work) {
  const limit = new AbortController();
  let timer;
  /** @type {Promise<never>} */
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => {
      const error = new NetworkError(`${what} did not come whole within ${seconds} s`);
      limit.abort(error);
      reject(error);
    }, seconds * 1000);
  });
  try {
    return await Promise.race([work(limit.signal), late]);
  } finally {
    clearTimeout(timer);
  }
}

/** @param {number} seconds @param {AbortSignal | undefined} signal @returns {Promise<void>} */
export function waited(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const gone = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", gone);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", gone, { once: true });
  });
}
