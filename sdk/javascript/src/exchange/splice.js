/**
 * Joins the event streams of several requests into one answer (docs/wire.md section 11.2).
 *
 * - Events are passed on up to the newest one with a mark. Later ones wait for the next mark, or for the end of the whole answer.
 * - At a seam the waiting events are dropped: another worker repeats them. Later events get the first stream's id and time, the role
 *   is not repeated, and the usage is the sum over all requests.
 * - Marks, and comments that pad records, are removed. A stream without marks is passed on byte for byte.
 */

import { MalformedError, TooLargeError } from "../errors.js";
import { concat, NONE, utf8 } from "../wire/bytes.js";
import { DONE, EventBlocks, field, isLast, MAX_EVENT } from "./events.js";
import { jsonObject } from "./problems.js";

const MARK = /^(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.([1-9]\d{0,9}):(\d{1,9}(?:,\d{1,9})*)$/;
const FAILURES = new Set(["server_error", "api_error", "overloaded_error"]);

/** @typedef {{ prompt: number, cached: number, count: number }} Counts tokens of one request */
/** @typedef {Record<string, any>} Event */

export class Splice {
  #marked;
  #blocks = new EventBlocks();
  /** @type {Uint8Array[]} */
  #held = [];
  /** @type {Event | null} */
  #first = null;
  /** @type {Counts | null} */
  #mark = null;
  /** @type {Counts[]} */
  #spent = [];
  #offset = 0; // characters of the text in log probabilities so far
  #shift = 0; // the same, before the last seam
  /** Ids of the answer's tokens, as far as marks told them. @type {number[]} */
  tokens = [];
  /** Whether the answer can be resumed from here. */
  open;
  /** Whether the last event says that the worker gave up. */
  failed = false;
  /** Whether an event came that may end the stream. */
  complete = false;

  /** @param {boolean} marked whether the first stream carries marks */
  constructor(marked) {
    this.#marked = marked;
    this.open = marked;
  }

  /** The bytes that may be passed on now. @param {Uint8Array} bytes */
  feed(bytes) {
    const out = [];
    for (const lines of this.#blocks.feed(bytes)) out.push(this.#event(lines));
    if (this.#blocks.pending > MAX_EVENT) {
      if (this.#marked) throw new TooLargeError(`the answer has an event of over ${MAX_EVENT} characters`);
      this.#blocks.forget();
    }
    return this.#marked ? concat(out) : bytes;
  }

  /** The stream has ended whole: the events that waited. */
  end() {
    const held = concat(this.#held);
    this.#held = [];
    return held;
  }

  /** The stream broke off, and another one continues it. */
  seam() {
    const spent = this.#mark ?? { prompt: 0, cached: 0, count: 0 };
    [this.#blocks, this.#held, this.#mark, this.failed, this.complete] = [new EventBlocks(), [], null, false, false];
    if (this.tokens.length === 0) return;
    this.#spent.push(spent);
    this.#shift = this.#offset;
  }

  /** @param {string[]} lines */
  #event(lines) {
    const data = field(lines, "data").join("\n");
    if (data === "") return NONE;
    const event = (data === DONE ? null : jsonObject(data)) ?? {};
    this.complete ||= isLast(data, event);
    if (!this.#marked) return NONE;
    const ids = field(lines, "id");
    if (this.#spent.length && data !== DONE && ids.length === 0 && saysTheRole(event)) return NONE;
    const written = this.#spent.length && data !== DONE ? JSON.stringify(this.#joined(event)) : null;
    const kept = lines.filter((line) => !line.startsWith("id:") && (written === null || !line.startsWith("data:")));
    const bytes = utf8([...kept, ...(written === null ? [] : [`data: ${written}`]), "", ""].join("\n"));
    this.#note(event);
    if (ids.length) return this.#markedEvent(ids[ids.length - 1], event, bytes);
    this.failed ||= FAILURES.has(event.error?.type);
    this.#held.push(bytes);
    return this.open ? NONE : this.end();
  }

  /** @param {string} text @param {Event} event @param {Uint8Array} bytes */
  #markedEvent(text, event, bytes) {
    if (text === "") this.open = false; // no other worker could resume from here
    else this.#follow(text);
    this.#first ??= Object.fromEntries(["id", "created"].filter((name) => name in event).map((name) => [name, event[name]]));
    this.#held.push(bytes);
    return this.end();
  }

  /** @param {string} text */
  #follow(text) {
    const found = MARK.exec(text);
    if (!found) throw new MalformedError("an event's id is not a resume mark");
    const [prompt, cached, count] = found.slice(1, 4).map(Number);
    const tokens = found[4].split(",").map(Number);
    if (count !== (this.#mark?.count ?? 0) + tokens.length) throw new MalformedError("a resume mark does not follow from the last one");
    this.#mark = { prompt, cached, count };
    for (const token of tokens) this.tokens.push(token);
  }

  /** Where the text ends, by the count of its log probabilities. @param {Event} event */
  #note(event) {
    for (const choice of choicesOf(event)) {
      const offset = choice.logprobs?.text_offset?.at?.(-1);
      const token = choice.logprobs?.tokens?.at?.(-1);
      if (Number.isInteger(offset) && typeof token === "string") this.#offset = this.#shift + offset + [...token].length;
    }
  }

  /** An event of a later stream, as one of this answer. @param {Event} event */
  #joined(event) {
    const shared = Object.entries(this.#first ?? {}).filter(([name]) => name in event);
    const joined = { ...event, ...Object.fromEntries(shared) };
    if (isObject(event.usage)) joined.usage = this.#sum(event.usage);
    if (isObject(event.response?.usage)) joined.response = { ...event.response, usage: this.#sum(event.response.usage) };
    if (this.#shift && choicesOf(event).some((choice) => Array.isArray(choice.logprobs?.text_offset))) {
      joined.choices = event.choices.map((/** @type {any} */ choice) => this.#shifted(choice));
    }
    return joined;
  }

  /** @param {any} choice */
  #shifted(choice) {
    if (!Array.isArray(choice?.logprobs?.text_offset)) return choice;
    const text_offset = choice.logprobs.text_offset.map((/** @type {number} */ offset) => offset + this.#shift);
    return { ...choice, logprobs: { ...choice.logprobs, text_offset } };
  }

  /** The usage of the last request and those before it. @param {Record<string, any>} usage */
  #sum(usage) {
    const all = (/** @type {"prompt" | "cached" | "count"} */ name) => this.#spent.reduce((sum, counts) => sum + counts[name], 0);
    const [prompt, cached, completion] = [all("prompt"), all("cached"), all("count")];
    const anthropic = "cache_read_input_tokens" in usage; // there, input_tokens are those that no cache had
    const more = new Map([
      ["prompt_tokens", prompt],
      ["input_tokens", anthropic ? prompt - cached : prompt],
      ["cache_read_input_tokens", cached],
      ["completion_tokens", completion],
      ["output_tokens", completion],
      ["total_tokens", prompt + completion],
    ]);
    const total = Object.entries(usage).map(([name, value]) => [name, Number.isInteger(value) ? value + (more.get(name) ?? 0) : value]);
    const summed = Object.fromEntries(total);
    for (const name of ["prompt_tokens_details", "input_tokens_details"]) {
      if (Number.isInteger(summed[name]?.cached_tokens)) {
        summed[name] = { ...summed[name], cached_tokens: summed[name].cached_tokens + cached };
      }
    }
    return summed;
  }
}

/** @param {any} value */
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
/** @param {Event} event @returns {any[]} */
const choicesOf = (event) => (Array.isArray(event.choices) ? event.choices.filter(isObject) : []);

/** @param {Event} event */
function saysTheRole(event) {
  const choices = choicesOf(event);
  return choices.length > 0 && choices.every((choice) => isObject(choice.delta) && "role" in choice.delta);
}
