/** One HTTP exchange with the gateway. No header is sent that was not asked for, and no redirect is followed. */

import http from "node:http";
import https from "node:https";

import { concat } from "./bytes.mjs";
import { ConfigurationError, ProblemError, TooLargeError, TransportError, TruncatedError } from "./errors.mjs";

export const PROBLEM = "application/problem+json";
export const MAX_PROBLEM = 65536; // of an answer that is an error, outside the seal or inside
const IDLE_MS = 100_000;

/**
 * Gives { status, headers, body, discard }: the body is an async iterable that throws TruncatedError where the connection breaks,
 * and `discard` closes the connection unread.
 */
export function exchange(method, url, headers = {}, content = null) {
  return new Promise((resolve, reject) => {
    const fail = (cause) => reject(new TransportError(`no response from ${url.host}`, { cause }));
    let request;
    try {
      request = (url.protocol === "https:" ? https : http).request(url, { method, headers, agent: false, timeout: IDLE_MS });
    } catch (cause) {
      reject(new ConfigurationError("a header has characters that HTTP does not allow", { cause }));
      return;
    }
    request.on("timeout", () => request.destroy(new Error(`silent for ${IDLE_MS} ms`)));
    request.on("error", fail);
    request.on("response", (response) => {
      const discard = () => response.destroy();
      resolve({ status: response.statusCode, headers: response.headers, body: bytesOf(response), discard });
    });
    if (content !== null) request.setHeader("content-length", content.length);
    request.end(content);
  });
}

/** The body as it comes. Leaving the loop early closes the connection. */
async function* bytesOf(response) {
  try {
    yield* response;
  } catch (cause) {
    throw new TruncatedError("the connection broke inside the response", { cause });
  }
}

/** A whole body, refused as soon as it is announced or has grown longer than `limit`. */
export async function readUpTo(limit, { headers, body, discard }, what) {
  if (Number(headers["content-length"]) > limit) {
    discard();
    throw new TooLargeError(`${what} is longer than ${limit} bytes`);
  }
  const parts = [];
  let size = 0;
  for await (const part of body) {
    size += part.length;
    if (size > limit) throw new TooLargeError(`${what} is longer than ${limit} bytes`);
    parts.push(part);
  }
  return concat(...parts);
}

/** The media type alone, without parameters. */
export const mediaType = (value) => (value ?? "").split(";")[0].trim().toLowerCase();

/** An answer of the gateway's own. Unauthenticated: it only ever chooses what to try next (wire.md section 13). */
export async function problemOf(answer) {
  const retryAfter = answer.headers["retry-after"];
  let problem = null;
  if (mediaType(answer.headers["content-type"]) === PROBLEM) {
    problem = jsonObject(await readUpTo(MAX_PROBLEM, answer, "a problem document"));
  } else {
    answer.discard();
  }
  const { type, title } = problem ?? {};
  return new ProblemError(String(type ?? "about:blank"), answer.status, String(title ?? ""), retryAfter);
}

/** The JSON object in some text or bytes; null where there is none. */
export function jsonObject(source) {
  try {
    const value = JSON.parse(typeof source === "string" ? source : new TextDecoder().decode(source));
    return value !== null && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}
