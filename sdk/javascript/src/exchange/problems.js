/** What a gateway says outside the seal (docs/wire.md section 13), and its bounded reading. Nothing of it is authenticated. */

import { NetworkError, ProblemError, TooLargeError } from "../errors.js";
import { NONE } from "../wire/bytes.js";

export const PROBLEM = "application/problem+json";
export const MAX_PROBLEM = 65536;
const LACRE = "urn:lacre:problem:";
const HTTP = "https://iana.org/assignments/http-problem-types#";

export const OHTTP_KEY = `${HTTP}ohttp-key`;
export const DATE = `${HTTP}date`;
export const INVALID_TOKEN = `${LACRE}invalid-token`;
export const NO_WORKER = `${LACRE}no-worker`;
export const UNKNOWN_POOL = `${LACRE}unknown-pool`;
export const WORKER_LOST = `${LACRE}worker-lost`;
export const UNCLAIMED = `${LACRE}unclaimed`;

/** The request did not run: something is away or full, and comes back by itself. */
export const AWAY = new Set(
  ["no-worker", "busy", "unavailable", "audit-unavailable", "budget-unavailable", "issuer-unavailable", "not-ready", "overloaded"].map(
    (each) => LACRE + each,
  ),
);

const NAMES = ["limit", "scope", "unit", "claim", "reason", "header", "request_id"];
const COUNTS = ["ceiling", "asked", "remaining", "fits"];
const LISTS = ["models", "pools", "paths", "methods"];
const isText = (/** @type {unknown} */ value) => typeof value === "string" && /^[!-~]{1,128}$/.test(value);
const isCount = (/** @type {any} */ value) => Number.isInteger(value) && value >= 0 && value <= 2 ** 53;

/** The members of a refusal; one of another form is dropped. @param {Record<string, any>} problem */
function detailsOf(problem) {
  const holds = (/** @type {string} */ name, /** @type {any} */ value) =>
    (NAMES.includes(name) && isText(value)) ||
    (COUNTS.includes(name) && isCount(value)) ||
    (name === "expired_at" && typeof value === "number" && Number.isFinite(value)) ||
    (LISTS.includes(name) && Array.isArray(value) && value.length >= 1 && value.length <= 32 && value.every(isText));
  return Object.fromEntries(Object.entries(problem).filter(([name, value]) => holds(name, value)));
}

/** The media type alone. @param {string | null | undefined} value */
export const mediaType = (value) => (value ?? "").split(";")[0].trim().toLowerCase();

/** The JSON object in some text or bytes; null if there is none. @param {string | Uint8Array} source @returns {Record<string, any> | null} */
export function jsonObject(source) {
  try {
    const value = JSON.parse(typeof source === "string" ? source : new TextDecoder("utf-8", { fatal: true }).decode(source));
    return value !== null && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}

/** A whole body, refused as soon as it has grown longer than `limit`. @param {Response} response @param {number} limit @param {string} what */
export async function readUpTo(response, limit, what) {
  if (Number(response.headers.get("content-length")) > limit) {
    await response.body?.cancel();
    throw new TooLargeError(`${what} is longer than ${limit} bytes`);
  }
  let all = NONE; // grows: kept pieces of one byte each would take a hundred times the limit
  let size = 0;
  const reader = response.body?.getReader();
  for (;;) {
    let step;
    try {
      step = reader ? await reader.read() : { done: true, value: undefined };
    } catch (cause) {
      throw new NetworkError(`the connection broke inside ${what}`, { cause });
    }
    if (step.done || !step.value) return all.slice(0, size);
    const end = size + step.value.length;
    if (end > limit) {
      await reader?.cancel();
      throw new TooLargeError(`${what} is longer than ${limit} bytes`);
    }
    if (end > all.length) {
      const larger = new Uint8Array(Math.min(Math.max(end, 2 * all.length, 4096), limit));
      larger.set(all.subarray(0, size));
      all = larger;
    }
    all.set(step.value, size);
    size = end;
  }
}

/** The problem document; null if it is none, or a longer one than a gateway sends. @param {Response} response */
async function documentOf(response) {
  try {
    return jsonObject(await readUpTo(response, MAX_PROBLEM, "a problem document"));
  } catch (error) {
    if (error instanceof TooLargeError) return null;
    throw error;
  }
}

/** @param {Response} response */
export async function problemOf(response) {
  const isProblem = mediaType(response.headers.get("content-type")) === PROBLEM;
  const problem = isProblem ? await documentOf(response) : null;
  if (!isProblem) await response.body?.cancel();
  const seconds = response.headers.get("retry-after") ?? "";
  return new ProblemError({
    type: typeof problem?.type === "string" ? problem.type : "about:blank",
    status: response.status,
    title: typeof problem?.title === "string" ? problem.title : "",
    retryAfter: /^[0-9]{1,9}$/.test(seconds) ? Number(seconds) : null,
    requestId: response.headers.get("lacre-request-id"),
    details: detailsOf(problem ?? {}),
  });
}
