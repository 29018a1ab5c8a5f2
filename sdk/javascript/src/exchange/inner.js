/**
 * The request inside the seal (docs/wire.md section 10): the application's, without anything that says who asks. And what it asks
 * for, which the outer headers repeat for policy and budget.
 */

import { ConfigurationError, TooLargeError } from "../errors.js";
import { outputOf } from "../trust/manifest.js";
import { isName } from "../trust/routes.js";
import { utf8 } from "../wire/bytes.js";
import { MAX_SEALED_REQUEST } from "../wire/ohttp.js";
import { beginningOf } from "./affinity.js";
import { jsonObject } from "./problems.js";

/** @typedef {{ method: string, path: string, headers: [string, string][], content: Uint8Array }} Plain header names are lower-case */
/** @typedef {{ plain: Plain, action: string, model: string, maxTokens: number, isDefault: boolean, beginning?: string | null }} Prepared beginning: of a chat's conversation */

const MAX_CONTENT = MAX_SEALED_REQUEST - 2 ** 17; // sealing adds less than that
const MAX_TOKENS = 2147483647;
const OTHER_CEILING = 512;
const NO_OUTPUT = 1;
const ALLOWED_HEADERS = new Set(["content-type", "accept", "inference-header-content-length", "lacre-resume"]);
const IDENTIFYING = ["user", "metadata", "safety_identifier", "prompt_cache_key", "client_metadata", "user_profile_id", "workspace_id"];
const RUNS = new Map([
  ["/v1/chat/completions", "chat"],
  ["/v1/responses", "chat"],
  ["/v1/messages", "chat"],
  ["/v1/completions", "complete"],
  ["/infill", "complete"],
  ["/v1/embeddings", "embed"],
  ["/v1/rerank", "rerank"],
  ["/v1/explain", "explain"],
]);
const COUNTS = new Set(["/v1/tokenize", "/v1/responses/input_tokens", "/v1/messages/count_tokens"]);
const GENERATES = new Set(["chat", "complete"]);
const LIMITS = ["max_completion_tokens", "max_output_tokens", "max_tokens", "n_predict"];
const KINDS = new Map([
  ["chat", "generate"],
  ["complete", "generate"],
  ["embed", "embed"],
  ["rerank", "rerank"],
]);

/** @param {Plain} plain */
export function actionOf({ method, path }) {
  const [bare] = path.split("?");
  if (method === "GET" && (bare === "/v1/models" || bare.startsWith("/v1/models/"))) return "inspect";
  if (method === "POST" && COUNTS.has(bare)) return "inspect";
  return RUNS.get(bare) ?? "http";
}

/** Whether running the request twice harms nothing but the bill. @param {Plain} plain */
export const isRepeatable = (plain) => ["GET", "HEAD"].includes(plain.method) || actionOf(plain) !== "http";

/** The end user or the conversation, as applications name them to OpenAI and Anthropic; null if they do not. @param {Plain} plain */
export function userOf(plain) {
  const body = actionOf(plain) === "http" ? {} : (jsonObject(plain.content) ?? {});
  const said = [body.safety_identifier, body.user, body.metadata?.user_id, body.prompt_cache_key];
  return said.find((each) => typeof each === "string" && each !== "") ?? null;
}

/**
 * The model that the caller asks for: in the body, in the header `lacre-model`, or as its option; else the default of the models.
 * @param {Plain} plain @param {Map<string, import("../trust/manifest.js").ModelEntry> | undefined} models @param {string | undefined} option
 */
export function askedModel(plain, models, option) {
  const action = actionOf(plain);
  const body = action === "http" ? {} : (jsonObject(plain.content) ?? {});
  const named = body.model ?? header(plain, "lacre-model") ?? option;
  if (named !== undefined) return typeof named === "string" ? named : null;
  return models !== undefined && [...RUNS.values()].includes(action) ? defaultModel(models, action) : null;
}

/** @param {Map<string, import("../trust/manifest.js").ModelEntry>} models @param {string} action */
function defaultModel(models, action) {
  const first = [...models.keys()][0] ?? "";
  const [wanted, kind] = [KINDS.get(action), models.get(first)?.kind ?? null];
  if (wanted === undefined || kind === wanted || (kind === null && wanted === "generate")) return first;
  return [...models].find(([, entry]) => entry.kind === wanted)?.[0] ?? first;
}

/**
 * models: those of the pool, the default first. routed: takes the place of the caller's name.
 * @param {Plain} plain @param {Map<string, import("../trust/manifest.js").ModelEntry>} models
 * @param {{ keepIdentifyingFields: boolean, model?: string, routed?: string }} options @returns {Prepared}
 */
export function prepare(plain, models, { keepIdentifyingFields, model: option, routed }) {
  if (plain.content.length > MAX_CONTENT) throw new TooLargeError(`the request's body has over ${MAX_CONTENT} bytes`);
  const action = actionOf(plain);
  const body = jsonObject(plain.content);
  const allowed = { ...plain, headers: plain.headers.filter(([name]) => ALLOWED_HEADERS.has(name)) };
  const preset = routed ?? header(plain, "lacre-model") ?? option ?? defaultModel(models, action);
  const asked = action === "http" ? askedCeiling(header(plain, "lacre-max-tokens")) : OTHER_CEILING;
  if (body === null) {
    return { plain: allowed, action, model: named(preset), maxTokens: action === "inspect" ? NO_OUTPUT : asked, isDefault: false };
  }
  const dropped = keepIdentifyingFields ? [] : IDENTIFYING;
  const sealed = Object.fromEntries(Object.entries(body).filter(([name]) => !dropped.includes(name)));
  if (action === "http") return { plain: withBody(allowed, body, sealed), action, model: named(preset), maxTokens: asked, isDefault: false };
  if (routed !== undefined || sealed.model === undefined || sealed.model === null) sealed.model = preset;
  const beginning = action === "chat" ? beginningOf(sealed) : null;
  return { plain: withBody(allowed, body, sealed), ...ceilingOf(action, sealed, models), beginning };
}

/** @param {string} action @param {Record<string, any>} body @param {Map<string, import("../trust/manifest.js").ModelEntry>} models */
function ceilingOf(action, body, models) {
  const model = named(body.model);
  const given = action === "explain" && typeof body.answer === "string"; // nothing is left to generate
  const does = action === "explain" && body.lens === true ? "lens" : action;
  if (given || ["embed", "rerank", "inspect"].includes(action)) return { action: does, model, maxTokens: NO_OUTPUT, isDefault: false };
  const isDefault = GENERATES.has(action) && !LIMITS.some((name) => isLimit(name, body[name]));
  const each = LIMITS.map((name) => body[name]).find(isCount) ?? (isDefault ? outputOf(models.get(model)) : OTHER_CEILING);
  const begun = Array.isArray(body.resume?.tokens) ? body.resume.tokens.length : 0;
  const all = Math.max(each - begun, 1) * (isCount(body.n) ? body.n : 1) * promptsIn(body.prompt);
  return { action: does, model, maxTokens: Math.min(all, MAX_TOKENS), isDefault };
}

/** A body of which nothing changes keeps its bytes. @param {Plain} plain @param {Record<string, any>} given @param {Record<string, any>} sealed */
function withBody(plain, given, sealed) {
  const same = Object.keys(given).length === Object.keys(sealed).length && given.model === sealed.model;
  return same ? plain : { ...plain, content: utf8(JSON.stringify(sealed)) };
}

/** @param {Plain} plain @param {string} name */
export const header = (plain, name) => plain.headers.find(([each]) => each === name)?.[1];

/** @param {unknown} model @returns {string} */
function named(model) {
  if (!isName(model)) throw new ConfigurationError("a model's name has 1 to 128 visible ASCII characters");
  return /** @type {string} */ (model);
}

/** @param {string | undefined} ceiling */
function askedCeiling(ceiling) {
  if (ceiling === undefined) return OTHER_CEILING;
  const asked = /^[1-9][0-9]{0,9}$/.test(ceiling) ? Number(ceiling) : 0;
  if (asked < 1 || asked > MAX_TOKENS) throw new ConfigurationError(`lacre-max-tokens: ${ceiling} is not 1 to ${MAX_TOKENS}`);
  return asked;
}

/** @param {any} value */
const isCount = (value) => Number.isSafeInteger(value) && value > 0;
/** @param {string} name @param {any} value */
const isLimit = (name, value) => value !== undefined && value !== null && (name !== "n_predict" || value !== -1);

/** How many prompts a completion has, each with choices of its own. A list of token ids is one. @param {any} prompt */
function promptsIn(prompt) {
  return Array.isArray(prompt) && prompt.some((each) => typeof each === "string" || Array.isArray(each)) ? prompt.length : 1;
}
