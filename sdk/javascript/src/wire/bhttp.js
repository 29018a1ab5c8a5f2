/** Binary HTTP (RFC 9292) as docs/wire.md section 9 narrows it: writes a known-length request, reads a response of either form. */

import { MalformedError, TooLargeError } from "../errors.js";
import { ascii, concat, latin1 } from "./bytes.js";
import { SliceReader, StreamReader } from "./readers.js";
import { varint } from "./varint.js";

/** @typedef {[string, string]} Field a name and a value of Latin-1 text */

export const LIMITS = {
  method: 32,
  scheme: 8,
  authority: 264,
  path: 8192,
  name: 256,
  value: 16384,
  fields: 128,
  headers: 65536,
  trailers: 32768,
  informational: 16,
  content: 2 ** 30,
};

const KNOWN_LENGTH_REQUEST = 0;
const KNOWN_LENGTH_RESPONSE = 1;
const INDETERMINATE_LENGTH_RESPONSE = 3;

const TOKEN = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/; // RFC 9110 section 5.6.2
const AUTHORITY = /^(?:(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)?$/; // a host, maybe a port; or empty
const PATH = /^(?:\*|\/[!-"$-~]*)$/; // visible ASCII without "#"
const CONNECTION_FIELDS = new Set(["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"]);

/**
 * @param {{ method: string, scheme: string, authority: string, path: string, fields: Field[], content: Uint8Array }} request
 */
export function encodeRequest({ method, scheme, authority, path, fields, content }) {
  // Senders refuse what receivers would refuse.
  if (!TOKEN.test(method) || method === "CONNECT") throw new MalformedError(`the method ${method} is not allowed`);
  if (scheme !== "https" && scheme !== "http") throw new MalformedError(`the scheme ${scheme} is not allowed`);
  if (!AUTHORITY.test(authority)) throw new MalformedError("the authority is not a host with an optional port");
  if (!PATH.test(path)) throw new MalformedError("the path is not of its form");
  if (content.length > LIMITS.content) throw new TooLargeError("the content is too long");
  checkContentLength(fields, content.length);
  const lines = encodeFields(fields, LIMITS.headers);
  return concat([
    varint(KNOWN_LENGTH_REQUEST),
    string(method, LIMITS.method),
    string(scheme, LIMITS.scheme),
    string(authority, LIMITS.authority),
    string(path, LIMITS.path),
    varint(lines.length),
    lines,
    varint(content.length),
    content,
    varint(0), // no trailers
  ]);
}

/** @param {string} text @param {number} limit */
function string(text, limit) {
  if (text.length > limit) throw new TooLargeError(`${text.length} bytes where ${limit} are the limit`);
  return concat([varint(text.length), ascii(text)]);
}

/** @param {Field[]} fields @param {number} limit */
function encodeFields(fields, limit) {
  if (fields.length > LIMITS.fields) throw new TooLargeError(`${fields.length} fields in a section`);
  fields.forEach(([name, value]) => checkField(name, value));
  const lines = concat(fields.flatMap(([name, value]) => [string(name, LIMITS.name), string(value, LIMITS.value)]));
  if (lines.length > limit) throw new TooLargeError(`a section of ${lines.length} bytes`);
  return lines;
}

// What no value may hold: control characters but the tab, what is not Latin-1, and white space at either end.
const NOT_IN_VALUE = /[\x00-\x08\x0a-\x1f\x7f\u0100-\uffff]|^[ \t]|[ \t]$/;

/**
 * Names are lower-case tokens, values what RFC 9113 section 8.2.1 allows, and nothing is about a connection (8.2.2).
 * @param {string} name @param {string} value
 */
function checkField(name, value) {
  if (!TOKEN.test(name) || /[A-Z]/.test(name)) throw new MalformedError("a field name is not a lower-case token");
  if (NOT_IN_VALUE.test(value)) throw new MalformedError(`the value of ${name} is not allowed`);
  if (CONNECTION_FIELDS.has(name) || (name === "te" && value !== "trailers")) {
    throw new MalformedError(`the field ${name} is about a connection`);
  }
}

/**
 * Correct if present; a response without content (to HEAD, or 304) may announce what it would have had.
 * @param {Field[]} fields @param {number} length
 */
function checkContentLength(fields, length, mayAnnounce = false) {
  const [value, ...others] = new Set(fields.filter(([name]) => name === "content-length").map(([, announced]) => announced));
  if (value === undefined) return;
  if (others.length || !/^[0-9]{1,15}$/.test(value)) throw new MalformedError("content-length is not one number");
  if (Number(value) !== length && !(mayAnnounce && length === 0)) {
    throw new MalformedError(`content-length ${value}, but ${length} bytes of content`);
  }
}

/**
 * Reads a response as it arrives and tells, in this order:
 *
 *     { kind: "informational", status, fields }   any number up to 16
 *     { kind: "head", status, fields }
 *     { kind: "content", bytes }                  any number, as they come
 *     { kind: "trailers", fields }                always once, maybe empty
 */
export class ResponseReader extends StreamReader {
  *read() {
    const indicator = yield* this.varint();
    if (indicator !== KNOWN_LENGTH_RESPONSE && indicator !== INDETERMINATE_LENGTH_RESPONSE) {
      throw new MalformedError(`framing indicator ${indicator}: not a response`);
    }
    const known = indicator === KNOWN_LENGTH_RESPONSE;
    let head;
    for (let informational = 0; ; informational++) {
      const status = yield* this.varint();
      const final = status >= 200 && status <= 599;
      if (!final && !(status >= 100 && status <= 199 && status !== 101)) throw new MalformedError(`status ${status}`);
      if (!final && informational === LIMITS.informational) throw new TooLargeError("too many informational responses");
      head = { kind: final ? "head" : "informational", status, fields: yield* this.#fields(known, LIMITS.headers) };
      yield head;
      if (final) break;
    }
    let length = 0;
    if (!(yield* this.atEnd())) {
      for (;;) {
        const size = yield* this.lengthUpTo(LIMITS.content - length, "content");
        for (let missing = size; missing > 0; ) {
          const bytes = yield* this.some(missing);
          missing -= bytes.length;
          yield { kind: "content", bytes };
        }
        length += size;
        if (known || size === 0) break;
      }
    }
    checkContentLength(head.fields, length, true);
    const trailers = yield* this.#fields(known, LIMITS.trailers);
    yield { kind: "trailers", fields: trailers };
    while (!(yield* this.atEnd())) {
      if ((yield* this.some(Infinity)).some((byte) => byte !== 0)) throw new MalformedError("padding that is not zero");
    }
  }

  /**
   * A field section: of the length before it (RFC 9292 section 3.1), or up to a zero (section 3.2). At the end of a message, what is
   * empty may be left out (section 3.8): fields, content and trailers.
   * @param {boolean} known @param {number} limit @returns {Generator<any, Field[], any>}
   */
  *#fields(known, limit) {
    /** @type {Field[]} */
    const fields = [];
    if (yield* this.atEnd()) return fields;
    if (known) {
      const section = new SliceReader(yield* this.take(yield* this.lengthUpTo(limit, "a field section")));
      while (section.left > 0) {
        const name = section.take(atMost(section.varint(), LIMITS.name, "a field name"));
        add(fields, name, section.take(atMost(section.varint(), LIMITS.value, "a field value")));
      }
      return fields;
    }
    for (let left = limit; ; ) {
      const name = yield* this.take(yield* this.lengthUpTo(LIMITS.name, "a field name"));
      if (name.length === 0) return fields;
      const value = yield* this.take(yield* this.lengthUpTo(LIMITS.value, "a field value"));
      left -= varint(name.length).length + name.length + varint(value.length).length + value.length;
      if (left < 0) throw new TooLargeError(`a field section of more than ${limit} bytes`);
      add(fields, name, value);
    }
  }
}

/** @param {number} length @param {number} limit @param {string} what */
function atMost(length, limit, what) {
  if (length > limit) throw new TooLargeError(`${what} of ${length} bytes, more than ${limit}`);
  return length;
}

/** @param {Field[]} fields @param {Uint8Array} nameBytes @param {Uint8Array} valueBytes */
function add(fields, nameBytes, valueBytes) {
  if (fields.length === LIMITS.fields) throw new TooLargeError(`more than ${LIMITS.fields} fields in a section`);
  const [name, value] = [latin1(nameBytes), latin1(valueBytes)];
  checkField(name, value);
  fields.push([name, value]);
}

/** The first value of a field, or undefined. @param {Field[]} fields @param {string} name */
export const valueOf = (fields, name) => fields.find(([key]) => key === name)?.[1];
