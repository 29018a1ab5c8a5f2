/** Splits an event stream into its events (WHATWG HTML section 9.2.6), wherever the network cut it. */

export const DONE = "[DONE]";
export const MAX_EVENT = 2 ** 20; // characters of one event that are waited for

const LAST_TYPES = new Set(["response.completed", "response.incomplete", "response.failed", "message_stop", "error"]);

export class EventBlocks {
  #decoder = new TextDecoder("utf-8");
  /** @type {string[]} */
  #parts = [];
  #afterCr = false;
  #endsLine = false;
  /** Characters of the event that is not complete. */
  pending = 0;

  /** The complete events, each as its lines without comments. @param {Uint8Array} bytes @returns {Generator<string[]>} */
  *feed(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (this.#afterCr && text.startsWith("\n")) text = text.slice(1);
    if (text === "") return;
    this.#afterCr = text.endsWith("\r");
    text = text.replaceAll("\r\n", "\n").replaceAll("\r", "\n");
    for (;;) {
      const here = this.#endsLine && text.startsWith("\n");
      const end = here ? 0 : text.indexOf("\n\n");
      if (end < 0) break;
      const block = this.#parts.join("") + text.slice(0, end);
      this.forget();
      text = text.slice(end + (here ? 1 : 2));
      yield block.split("\n").filter((line) => line !== "" && !line.startsWith(":"));
    }
    if (text === "") return;
    this.#parts.push(text);
    this.pending += text.length;
    this.#endsLine = text.endsWith("\n");
  }

  /** Drops the event that is not complete. */
  forget() {
    this.#parts = [];
    this.pending = 0;
    this.#endsLine = false;
  }
}

/** The values of a field, in order. @param {string[]} lines @param {string} name */
export function field(lines, name) {
  const begin = `${name}:`;
  return lines.filter((line) => line.startsWith(begin)).map((line) => line.slice(begin.length).replace(/^ /, ""));
}

/** Whether a stream of one of the model APIs may end with this event (docs/wire.md section 11). @param {string} data @param {Record<string, any>} event */
export function isLast(data, event) {
  return data === DONE || LAST_TYPES.has(event.type) || event.stop === true || (event.error !== undefined && event.error !== null);
}
