/**
 * A sealed chat: sections 1 and 10 to 14 of wire.md put together.
 *
 *     LACRE_URL='lacre://host?trust=…' LACRE_TOKEN=… node client.mjs [--kem xwing|x25519] [--pool NAME] [--model NAME]
 *                                                                    [--max-tokens N] PROMPT
 *
 * prints one JSON line for each piece of the answer, {"piece": …}, and a last one, {"done": true, …}, once the answer is known
 * to be whole. On failure one JSON line goes to stderr, {"error": CLASS, "message": …, "type": …}, and the exit code is not zero.
 */

import { randomBytes } from "node:crypto";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

import { encodeRequest, ResponseReader, valueOf } from "./bhttp.mjs";
import { concat } from "./bytes.mjs";
import {
  ApiError,
  ConfigurationError,
  LacreError,
  MalformedError,
  NoUsableKeyError,
  ProblemError,
  TooLargeError,
  TransportError,
  TruncatedError,
} from "./errors.mjs";
import { exchange, jsonObject, MAX_PROBLEM, mediaType, PROBLEM, problemOf } from "./http.mjs";
import { MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, SealedRequest } from "./ohttp.mjs";
import { ordered } from "./routes.mjs";
import { chooseKey, clock, parseConnectionString, readReceipt, Trust } from "./trust.mjs";

const OHTTP_KEY = "https://iana.org/assignments/http-problem-types#ohttp-key";
const DATE = "https://iana.org/assignments/http-problem-types#date";
const NO_WORKER = "urn:lacre:problem:no-worker";
const MAX_EVENT = 1024 * 1024; // of one server-sent event

/** `kems`: the names of those accepted, X-Wing alone unless the caller says otherwise (section 3). */
export class Client {
  #token;
  #trust;
  #manifest = null;
  #kems;
  #salt = randomBytes(16).toString("hex"); // one client lives for one call here, so the salt never grows old
  #offset = 0; // of the worker's clock, in seconds; for the inner date alone

  constructor({ url, token, kems = ["xwing"] }) {
    const { base, root } = parseConnectionString(url);
    if (!token || !/^[!-~]+$/.test(token)) throw new ConfigurationError("a bearer token is visible ASCII");
    this.#token = token;
    this.#trust = new Trust(base, root);
    this.#kems = kems;
  }

  /** Gives the pieces of the answer's text as they arrive; what it returns at the end are the totals. */
  async *chat(messages, { pool, model, maxTokens = 512 } = {}) {
    if (!(this.#manifest?.exp > clock())) this.#manifest = await this.#trust.fetch();
    const ways = waysOf(this.#manifest, pool, model);
    const once = new Set([OHTTP_KEY, DATE]); // what is worth one more try, each once (section 14)
    for (let attempts = 1; ; attempts++) {
      try {
        const totals = yield* this.#attempt(messages, { ...ways[0], maxTokens });
        return { ...totals, ...ways[0], attempts };
      } catch (error) {
        if (error instanceof ProblemError && error.type === NO_WORKER && ways.length > 1) {
          ways.shift(); // it did not run, so the next pool of the route may have it (section 3)
          continue;
        }
        if (!(error instanceof ProblemError || error instanceof ApiError) || !once.delete(error.type)) throw error;
        if (error instanceof ProblemError && error.type === OHTTP_KEY) this.#manifest = await this.#trust.fetch();
        else if (error instanceof ApiError && error.type === DATE && error.date) this.#offset = error.date - clock();
        else throw error;
      }
    }
  }

  async *#attempt(messages, options) {
    const call = describe(this.#manifest, options);
    const config = chooseKey(call.pool, this.#kems);
    const body = {
      model: call.model,
      messages,
      max_tokens: options.maxTokens,
      stream: true,
      stream_options: { include_usage: true },
    };
    const started = performance.now();
    const request = await SealedRequest.to(config);
    const parts = [];
    for await (const part of request.seal([this.#inner(body, call.headers)])) parts.push(part);
    const sealed = concat(...parts);
    const opener = await request.opener();
    const sealMs = performance.now() - started;

    const answer = await exchange("POST", new URL("/v1/sealed", this.#trust.base), this.#outer(call.headers), sealed);
    if (answer.status !== 200) throw await problemOf(answer);
    if (mediaType(answer.headers["content-type"]) !== MEDIA_TYPE_RESPONSE || answer.headers["content-encoding"]) {
      answer.discard(); // unread (section 12)
      throw new TransportError("the gateway's 200 is not a sealed response");
    }
    const reading = new Answer(opener);
    for await (const bytes of answer.body) yield* reading.push(bytes);
    yield* reading.end();
    const totals = reading.totals();
    const receipt = totals.receipt === null ? null : readReceipt(totals.receipt, call.pool, request.digest, call.model);
    const { kem } = config;
    return {
      ...totals,
      kem: kem.name,
      receipt: totals.receipt === null ? null : (receipt ?? "does not verify"),
      seal_ms: round(sealMs),
      open_ms: round(reading.openMs),
    };
  }

  /** The request behind the seal, as Binary HTTP (section 10). */
  #inner(body, outer) {
    return encodeRequest({
      method: "POST",
      scheme: "https",
      authority: "lacre.invalid",
      path: "/v1/chat/completions",
      fields: [
        ["content-type", "application/json"],
        ["accept", "text/event-stream"],
        ["date", new Date((clock() + this.#offset) * 1000).toUTCString()],
        ["lacre-cache-salt", this.#salt],
        ...Object.entries(outer).map(([name, value]) => [name.toLowerCase(), value]),
      ],
      content: new TextEncoder().encode(JSON.stringify(body)),
    });
  }

  #outer(headers) {
    return {
      Authorization: `Bearer ${this.#token}`,
      "Content-Type": MEDIA_TYPE_REQUEST,
      Accept: MEDIA_TYPE_RESPONSE,
      Incremental: "?1",
      ...headers,
    };
  }
}

/** Where a call may go: the caller's pool, or those of the route that has the model's name. */
function waysOf(manifest, pool, model) {
  const asked = model ?? manifest.pools.get("default")?.defaultModel;
  const route = pool === undefined ? manifest.routes.get(asked) : undefined;
  if (route === undefined) return [{ pool: pool ?? "default", model }];
  const there = ordered(route).filter((way) => manifest.pools.has(way.pool));
  if (there.length === 0) throw new NoUsableKeyError(`no pool of the route ${asked} is in the manifest`);
  return there.map((way) => ({ pool: way.pool, model: way.model }));
}

/** The pool and the outer headers of a call (section 12), or an error where the manifest does not have what is asked. */
function describe(manifest, { pool: name, model, maxTokens }) {
  const pool = manifest.pools.get(name);
  if (!pool) throw new NoUsableKeyError(`the manifest has no pool ${name}`);
  const named = model ?? pool.defaultModel;
  if (!pool.models.has(named)) throw new NoUsableKeyError(`the pool has no model ${named}`);
  if (!pool.shapes.includes("none")) throw new NoUsableKeyError("the pool takes no request of shape none");
  if (!Number.isInteger(maxTokens) || maxTokens < 1 || maxTokens > 2147483647) {
    throw new ConfigurationError("a token ceiling is 1 to 2147483647");
  }
  const headers = {
    "Lacre-Pool": name,
    "Lacre-Model": named,
    "Lacre-Action": "chat",
    "Lacre-Max-Tokens": String(maxTokens),
    "Lacre-Shape": "none",
  };
  return { pool, model: named, headers };
}

/** One answer: records are opened, the Binary HTTP in them read, the events in that told. */
class Answer {
  #opener;
  #reader = new ResponseReader();
  #head = null;
  #trailers = null;
  #events = new EventReader();
  #done = false;
  #error = []; // the content of an answer that is an error
  #errorSize = 0;
  #pieces = 0;
  #usage = null;
  #finishReason = null;
  openMs = 0;

  constructor(opener) {
    this.#opener = opener;
  }

  *push(bytes) {
    for (const record of this.#timed(this.#opener.push(bytes))) yield* this.#read(this.#reader.push(record));
  }

  /** Whole only if the final chunk opens, and the message in it ends (section 1), and the events in that. */
  *end() {
    for (const record of this.#timed(this.#opener.end())) yield* this.#read(this.#reader.push(record));
    yield* this.#read(this.#reader.end());
    if (this.#head.status >= 300) throw apiError(this.#head, concat(...this.#error));
    if (!this.#done) throw new TruncatedError("the stream of events ends without [DONE]"); // section 11
  }

  totals() {
    return {
      pieces: this.#pieces,
      usage: this.#usage,
      finish_reason: this.#finishReason,
      receipt: valueOf(this.#trailers, "lacre-receipt") ?? null,
    };
  }

  /** The same things, with the time that it takes to come by them. */
  *#timed(records) {
    for (;;) {
      const started = performance.now();
      const { done, value } = records.next();
      this.openMs += performance.now() - started;
      if (done) return;
      yield value;
    }
  }

  *#read(parts) {
    for (const part of parts) {
      if (part.kind === "head") this.#start(part);
      else if (part.kind === "trailers") this.#trailers = part.fields;
      else if (part.kind === "content" && this.#head.status >= 300) this.#keepError(part.bytes);
      else if (part.kind === "content") yield* this.#texts(this.#events.push(part.bytes));
    }
  }

  #start(head) {
    this.#head = head;
    const streams = mediaType(valueOf(head.fields, "content-type")) === "text/event-stream";
    if (head.status < 300 && !streams) throw new MalformedError("the answer is not a stream of events");
  }

  #keepError(bytes) {
    this.#errorSize += bytes.length;
    if (this.#errorSize > MAX_PROBLEM) throw new TooLargeError(`an error of more than ${MAX_PROBLEM} bytes`);
    this.#error.push(bytes);
  }

  *#texts(events) {
    for (const data of events) {
      this.#done ||= data === "[DONE]";
      if (this.#done) continue;
      const chunk = parseEvent(data);
      if (chunk.error) throw new ApiError(this.#head.status, chunk.error.type, String(chunk.error.message));
      this.#usage = chunk.usage ?? this.#usage;
      const choice = chunk.choices?.[0];
      this.#finishReason = choice?.finish_reason ?? this.#finishReason;
      const text = choice?.delta?.content;
      if (typeof text !== "string" || text === "") continue;
      this.#pieces += 1;
      yield text;
    }
  }
}

/** An error that the API told inside the seal: authentic, once the whole answer is. */
function apiError(head, content) {
  const body = jsonObject(content) ?? {};
  const isProblem = mediaType(valueOf(head.fields, "content-type")) === PROBLEM;
  const error = isProblem
    ? new ApiError(head.status, body.type, String(body.title ?? body.type))
    : new ApiError(head.status, body.error?.type, String(body.error?.message ?? "an error without a message"));
  const date = valueOf(head.fields, "date") ?? "";
  if (/^[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT$/.test(date)) error.date = Date.parse(date) / 1000;
  return error;
}

/** Server-sent events (HTML section 9.2): gives the data of each event once its empty line is there. */
class EventReader {
  #text = new TextDecoder("utf-8", { fatal: true });
  #line = "";
  #data = [];
  #size = 0;

  *push(bytes) {
    let text;
    try {
      text = this.#text.decode(bytes, { stream: true });
    } catch (cause) {
      throw new MalformedError("the events are not UTF-8", { cause });
    }
    const lines = text.split("\n");
    for (const [i, piece] of lines.entries()) {
      this.#size += piece.length;
      if (this.#size > MAX_EVENT) throw new TooLargeError(`an event of more than ${MAX_EVENT} characters`);
      this.#line += piece;
      if (i < lines.length - 1) yield* this.#endLine();
    }
  }

  *#endLine() {
    const line = this.#line.endsWith("\r") ? this.#line.slice(0, -1) : this.#line;
    this.#line = "";
    if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    if (line !== "") return;
    if (this.#data.length) yield this.#data.join("\n");
    this.#data = [];
    this.#size = 0;
  }
}

/** One event's JSON object. */
function parseEvent(data) {
  const chunk = jsonObject(data);
  if (chunk === null) throw new MalformedError("an event is not a JSON object");
  return chunk;
}

const round = (ms) => Math.round(ms * 1000) / 1000;

function readArguments() {
  const options = {
    kem: { type: "string", default: "xwing" },
    pool: { type: "string" },
    model: { type: "string" },
    "max-tokens": { type: "string", default: "512" },
  };
  try {
    const { values, positionals } = parseArgs({ allowPositionals: true, options });
    if (positionals.length === 1 && ["xwing", "x25519"].includes(values.kem)) return { ...values, prompt: positionals[0] };
  } catch (cause) {
    throw new ConfigurationError(cause.message, { cause });
  }
  throw new ConfigurationError("client.mjs [--kem xwing|x25519] [--pool NAME] [--model NAME] [--max-tokens N] PROMPT");
}

async function main() {
  const { kem, pool, model, "max-tokens": maxTokens, prompt } = readArguments();
  const { LACRE_URL: url = "", LACRE_TOKEN: token = "" } = process.env;
  const client = new Client({ url, token, kems: [kem] });
  const answer = client.chat([{ role: "user", content: prompt }], { pool, model, maxTokens: Number(maxTokens) });
  for (;;) {
    const { done, value } = await answer.next();
    process.stdout.write(JSON.stringify(done ? { done, ...value } : { piece: value }) + "\n");
    if (done) return;
  }
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  main().catch((error) => {
    if (!(error instanceof LacreError)) throw error;
    process.stderr.write(JSON.stringify({ error: error.name, message: error.message, type: error.type }) + "\n");
    process.exitCode = 1;
  });
}
