/** `sealedFetch`: a `fetch` that seals each request to the workers behind a gateway. */

import { ConfigurationError, ProblemError } from "./errors.js";
import { ResumableAnswer, asking } from "./exchange/resume.js";
import { AUTHORITY, Sealing } from "./exchange/sealing.js";
import { parseConnectionString } from "./trust/connection.js";
import { defaultMemory } from "./trust/memory.js";
import { KEMS } from "./wire/keys.js";
import { SHAPES } from "./wire/shapes.js";

/** What programs take as their API's address: nothing is sent there. */
export const BASE_URL = `https://${AUTHORITY}/v1`;

const NULL_BODY = new Set([204, 205, 304]);
const KEM_NAMES = [...KEMS.values()].map(({ name }) => name);

/** @typedef {import("./exchange/sealing.js").Info} Info */
/**
 * @typedef {object} CallOptions
 * @property {string} [pool] default: by the manifest's routes, else `default`
 * @property {string} [model] of requests whose body names none
 * @property {string} [cacheScope] names one of the program's users: their prefix cache is apart from the others'
 * @property {number | null} [retries] default: what did not run for 30 s, anything else twice
 * @property {number} [resume] how often a broken answer is resumed; default 3
 */
/**
 * @typedef {object} ClientOptions
 * @property {string | ((asked: { renew: boolean }) => string | Promise<string>)} token a JWT for the gateway, or what gets one.
 *   renew: the gateway refused the last one
 * @property {readonly string[]} [kems] default: `["xwing"]`
 * @property {"pad" | "none"} [shape] default: `pad`
 * @property {Record<string, string>} [pinModels] the digest `sha256:…` of a model's file, by its name
 * @property {boolean} [affinity] default true: the turns of a chat come to the worker that has it in its prefix cache. The gateway then
 *   sees which requests are of one conversation
 * @property {boolean} [keepIdentifyingFields] default: members such as `user` are dropped from bodies
 * @property {import("./trust/memory.js").Memory} [memory] default: IndexedDB in browsers, else a file of this user
 * @property {typeof fetch} [fetch] sends what is sealed; default: the platform's
 */
/**
 * @typedef {((input: RequestInfo | URL, init?: RequestInit) => Promise<Response>) & {
 *   with: (options: CallOptions) => SealedFetch,
 *   manifest: () => Promise<import("./trust/manifest.js").Manifest>,
 * }} SealedFetch
 */

/** @type {WeakMap<Response, { info: Info | null, refusal: ProblemError | null }>} */
const KNOWN = new WeakMap();

/**
 * Fetches and verifies the gateway's manifest. `url`: `lacre://host[:port]?trust=…`, from the operator.
 * @param {string} url @param {ClientOptions & CallOptions} options @returns {Promise<SealedFetch>}
 */
export async function sealedFetch(url, options) {
  const connection = parseConnectionString(url);
  const { token, fetch: outer = globalThis.fetch.bind(globalThis) } = options ?? {};
  if (typeof token !== "function" && (typeof token !== "string" || !/^[!-~]+$/.test(token))) {
    throw new ConfigurationError("`token` is not a text of visible ASCII, nor a function that gets one");
  }
  const client = {
    kems: options.kems ?? ["xwing"],
    shape: options.shape ?? "pad",
    pinModels: pinsOf(options.pinModels ?? {}),
    affinity: options.affinity ?? true,
    keepIdentifyingFields: options.keepIdentifyingFields ?? false,
  };
  if (!client.kems.length || !client.kems.every((kem) => KEM_NAMES.includes(kem))) {
    throw new ConfigurationError(`\`kems\` are some of ${KEM_NAMES.join(", ")}`);
  }
  if (!SHAPES.includes(client.shape)) throw new ConfigurationError(`\`shape\` is one of ${SHAPES.join(", ")}`);
  const get = typeof token === "function" ? token : () => token;
  const sealing = new Sealing(connection, get, options.memory ?? (await defaultMemory()), outer);
  await sealing.manifest();
  return fetchOf(sealing, client, options);
}

/** A pin that named no file would be passed over silently. @param {Record<string, string>} given */
function pinsOf(given) {
  const own = given !== null && typeof given === "object" && !Array.isArray(given) && !(given instanceof Map);
  const pins = new Map(own ? Object.entries(given) : []);
  if (!own || ![...pins.values()].every((pin) => typeof pin === "string" && /^sha256:[0-9a-f]{64}$/.test(pin))) {
    throw new ConfigurationError("`pinModels` is an object of `sha256:` and 64 hexadecimal digits in small letters, by the model's name");
  }
  return pins;
}

/** @param {Sealing} sealing @param {any} client @param {CallOptions} call @returns {SealedFetch} */
function fetchOf(sealing, client, call) {
  const { pool, model, cacheScope, retries = null, resume = 3 } = call;
  if (![retries ?? 0, resume].every((each) => Number.isInteger(each) && each >= 0)) {
    throw new ConfigurationError("`retries` and `resume` are whole numbers from 0");
  }
  const options = { ...client, pool, model, cacheScope, retries, resume };
  const sealed = (/** @type {RequestInfo | URL} */ input, /** @type {RequestInit} */ init = {}) => sent(sealing, options, input, init);
  return Object.assign(sealed, {
    with: (/** @type {CallOptions} */ more) => fetchOf(sealing, client, { ...call, ...more }),
    manifest: () => sealing.manifest(),
  });
}

/** @param {Sealing} sealing @param {import("./exchange/sealing.js").Options} options @param {RequestInfo | URL} input @param {RequestInit} init */
async function sent(sealing, options, input, init) {
  // The caller's signal is followed by a listener: what `Request` and `AbortSignal.any` make of it may be collected as garbage.
  const outside = init.signal ?? (input instanceof Request ? input.signal : null);
  outside?.throwIfAborted();
  const request = new Request(typeof input === "string" ? new URL(input, BASE_URL) : input, { ...init, signal: null });
  const { host, pathname, search, protocol } = new URL(request.url);
  if (host !== AUTHORITY || protocol !== "https:") {
    throw new ConfigurationError(`a sealed request goes to ${BASE_URL}, and not to ${host}`, { remedy: "Pass `baseURL: BASE_URL`." });
  }
  const leaving = new AbortController(); // also aborted if the caller drops the answer's body
  const follow = () => leaving.abort(outside?.reason);
  outside?.addEventListener("abort", follow, { once: true, signal: leaving.signal });
  const ended = () => outside?.removeEventListener("abort", follow); // it may be the signal of a whole program
  try {
    return await answered(sealing, options, request, pathname + search, { leaving, ended });
  } catch (error) {
    ended();
    if (error instanceof ProblemError) return refused(error, pathname);
    throw error;
  }
}

/** @typedef {{ leaving: AbortController, ended: () => void }} Stay ended: nothing more of the answer will come */

/** @param {Sealing} sealing @param {import("./exchange/sealing.js").Options} options @param {Request} request @param {string} path @param {Stay} stay */
async function answered(sealing, options, request, path, stay) {
  const given = { options, signal: stay.leaving.signal };
  const content = new Uint8Array(await request.arrayBuffer());
  const asked = asking({ method: request.method, path, headers: [...request.headers], content }, options.resume);
  const answer = new ResumableAnswer(sealing, asked, given, await sealing.exchange(asked, given));
  const { status, fields } = answer.head;
  const response = new Response(await bodyOf(answer, stay, status), { status, headers: fields });
  KNOWN.set(response, { info: answer.info, refusal: null });
  return response;
}

/** @param {ResumableAnswer} answer @param {Stay} stay @param {number} status */
async function bodyOf(answer, { leaving, ended }, status) {
  const pieces = answer.content();
  if (NULL_BODY.has(status)) {
    for await (const _ of pieces); // there is no body to read: its end is verified here
    ended();
    return null;
  }
  return new ReadableStream(
    {
      async pull(controller) {
        try {
          leaving.signal.throwIfAborted(); // also with records that came before
          const { done, value } = await pieces.next();
          leaving.signal.throwIfAborted();
          if (!done) return controller.enqueue(value);
        } catch (error) {
          ended();
          throw error;
        }
        ended();
        controller.close();
      },
      async cancel(reason) {
        leaving.abort(reason);
        await answer.discard();
      },
    },
    { highWaterMark: 0 },
  );
}

/**
 * A refusal as the API's clients read one. Nobody signed it. `x-should-retry`: the package `openai` does not try again what was
 * tried here.
 * @param {ProblemError} problem @param {string} path
 */
function refused(problem, path) {
  const error = { message: problem.message, type: problem.type, code: problem.type.split(/[:#]/).pop(), param: null };
  const messages = path === "/v1/messages" || path.startsWith("/v1/messages/");
  const headers = new Headers({ "content-type": "application/json", "x-should-retry": "false" });
  if (problem.requestId) headers.set("x-request-id", problem.requestId);
  if (problem.retryAfter !== null) headers.set("retry-after", String(problem.retryAfter));
  const status = problem.status >= 400 && problem.status <= 599 ? problem.status : 502;
  const response = new Response(JSON.stringify(messages ? { type: "error", error } : { error }), { status, headers });
  KNOWN.set(response, { info: null, refusal: problem });
  return response;
}

/** What was verified of an answer; null for a gateway's refusal, of which nothing was. @param {Response} response @returns {Info | null} */
export const infoOf = (response) => known(response).info;

/** The gateway's refusal; null if a worker answered. @param {Response} response @returns {ProblemError | null} */
export const refusalOf = (response) => known(response).refusal;

/** @param {Response} response */
function known(response) {
  const found = KNOWN.get(response);
  if (!found) throw new ConfigurationError("this response is not one that a sealed fetch returned");
  return found;
}
