/** Chunked Oblivious HTTP, the client's side: sections 6 to 8 of docs/wire.md (draft-ietf-ohai-chunked-ohttp-08, RFC 9458). */

import { AlteredError, MalformedError, TooLargeError, TruncatedError, UsedError } from "../errors.js";
import { ascii, concat, NONE, sha256, uint } from "./bytes.js";
import { headerOf, setupSender, TAG_SIZE } from "./keys.js";
import { StreamReader } from "./readers.js";
import { varint } from "./varint.js";

export const MEDIA_TYPE_REQUEST = "message/ohttp-chunked-req";
export const MEDIA_TYPE_RESPONSE = "message/ohttp-chunked-res";

export const MAX_CHUNK = 16384;
export const MAX_REQUEST_CHUNKS = 8192;
export const MAX_SEALED_REQUEST = 7 * 1024 * 1024;

const LABEL_REQUEST = ascii("message/bhttp chunked request");
const LABEL_RESPONSE = ascii("message/bhttp chunked response");
const FINAL = ascii("final");

/** HMAC-SHA-256. @param {Uint8Array} key @param {Uint8Array} data */
export async function hmac(key, data) {
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const imported = await crypto.subtle.importKey("raw", /** @type {BufferSource} */ (key), algorithm, false, ["sign"]);
  return new Uint8Array(await crypto.subtle.sign("HMAC", imported, /** @type {BufferSource} */ (data)));
}

/** HKDF of RFC 5869 with SHA-256; all that is asked for here fits into one block. @param {Uint8Array} prk @param {string} info @param {number} size */
const expand = async (prk, info, size) => (await hmac(prk, concat([ascii(info), Uint8Array.of(1)]))).subarray(0, size);

/** @param {Uint8Array} hdr */
export const requestInfo = (hdr) => concat([LABEL_REQUEST, Uint8Array.of(0), hdr]);

/** L of section 7: the size of the response's nonce, and of the secret exported for it. @param {import("./keys.js").Aead} aead */
export const responseSecretSize = (aead) => Math.max(aead.nonceSize, aead.keySize);

/** One request to one key, and the opening of its one response. */
export class SealedRequest {
  #config;
  #hdr;
  #context;
  #state = "fresh";

  /** @param {import("./keys.js").KeyConfiguration} config @param {Uint8Array} hdr @param {any} context */
  constructor(config, hdr, context) {
    this.#config = config;
    this.#hdr = hdr;
    this.#context = context;
    this.enc = new Uint8Array(context.enc);
  }

  /** A fresh encapsulation: every attempt needs its own (section 6). @param {import("./keys.js").KeyConfiguration} config */
  static async to(config) {
    const hdr = headerOf(config);
    return new SealedRequest(config, hdr, await setupSender(config, requestInfo(hdr)));
  }

  /** SHA-256 of hdr ‖ enc: the name of this request in grants, audit entries and receipts. */
  digest() {
    return sha256(concat([this.#hdr, this.enc]));
  }

  /** The sealed body, in full chunks but for the last (section 8). @param {Uint8Array} plain */
  async seal(plain) {
    this.#step("fresh", "sealed");
    const chunks = Math.max(Math.ceil(plain.length / MAX_CHUNK), 1);
    if (chunks > MAX_REQUEST_CHUNKS) throw new TooLargeError(`a request has at most ${MAX_REQUEST_CHUNKS} chunks`);
    const parts = [this.#hdr, this.enc];
    let size = this.#hdr.length + this.enc.length;
    for (let i = 0; i < chunks; i++) {
      const last = i === chunks - 1;
      const chunk = plain.slice(i * MAX_CHUNK, (i + 1) * MAX_CHUNK);
      const prefix = varint(last ? 0 : chunk.length + TAG_SIZE);
      size += prefix.length + chunk.length + TAG_SIZE;
      if (size > MAX_SEALED_REQUEST) throw new TooLargeError(`a sealed request has at most ${MAX_SEALED_REQUEST} bytes`);
      parts.push(prefix, new Uint8Array(await this.#context.seal(chunk.buffer, (last ? FINAL : NONE).buffer)));
    }
    return concat(parts);
  }

  /** The reader of this request's response. Only once the whole request is sealed, and once. */
  async opener() {
    this.#step("sealed", "used");
    const size = responseSecretSize(this.#config.aead);
    const secret = new Uint8Array(await this.#context.export(LABEL_RESPONSE.buffer, size));
    return new ResponseOpener(this.#config.aead, this.enc, secret);
  }

  /** @param {string} from @param {string} to */
  #step(from, to) {
    if (this.#state !== from) throw new UsedError(`a request that is ${this.#state} cannot be ${to}`);
    this.#state = to;
  }
}

/**
 * The response's keys (section 7), which start from HPKE's export and the worker's nonce.
 * @param {import("./keys.js").Aead} aead @param {Uint8Array} enc @param {Uint8Array} secret @param {Uint8Array} nonce
 */
export async function responseKeys(aead, enc, secret, nonce) {
  const prk = await hmac(concat([enc, nonce]), secret);
  return { prk, key: await expand(prk, "key", aead.keySize), base: await expand(prk, "nonce", aead.nonceSize) };
}

/** Splits a response into its nonce and its chunks, which are still sealed. */
class Frames extends StreamReader {
  #secretSize;

  /** @param {number} secretSize */
  constructor(secretSize) {
    super();
    this.#secretSize = secretSize;
  }

  *read() {
    yield { nonce: yield* this.take(this.#secretSize) };
    for (;;) {
      const length = yield* this.lengthUpTo(MAX_CHUNK + TAG_SIZE, "a chunk");
      if (length === 0) {
        const sealed = yield* this.rest(MAX_CHUNK + TAG_SIZE, "the final chunk");
        if (sealed.length < TAG_SIZE) throw new TruncatedError("the message ends inside its final chunk");
        yield { sealed, aad: FINAL };
        return;
      }
      if (length <= TAG_SIZE) throw new MalformedError("a chunk that is not final is empty");
      yield { sealed: yield* this.take(length), aad: NONE };
    }
  }
}

/** Opens the records of one response as they arrive, in order. Only `end` says that none is missing. */
export class ResponseOpener {
  #aead;
  #enc;
  #secret;
  #frames;
  #failed = false;
  #index = 0;
  /** @type {((sealed: Uint8Array, nonce: Uint8Array, aad: Uint8Array) => Promise<Uint8Array>) | null} */
  #decrypt = null;
  #base = NONE;

  /** @param {import("./keys.js").Aead} aead @param {Uint8Array} enc @param {Uint8Array} secret */
  constructor(aead, enc, secret) {
    this.#aead = aead;
    this.#enc = enc;
    this.#secret = secret;
    this.#frames = new Frames(responseSecretSize(aead));
  }

  /** @param {Uint8Array} bytes @returns {AsyncGenerator<Uint8Array>} */
  push(bytes) {
    this.#alive();
    return this.#opened(this.#frames.push(bytes));
  }

  /** @returns {AsyncGenerator<Uint8Array>} */
  end() {
    this.#alive();
    return this.#opened(this.#frames.end());
  }

  #alive() {
    if (this.#failed) throw new UsedError("this message has already failed");
  }

  /** @param {Iterable<any>} frames */
  async *#opened(frames) {
    try {
      for (const frame of frames) {
        if (frame.nonce) await this.#begin(frame.nonce);
        else yield await this.#open(frame.sealed, frame.aad);
      }
    } catch (error) {
      this.#failed = true;
      throw error;
    }
  }

  /** @param {Uint8Array} nonce */
  async #begin(nonce) {
    const { key, base } = await responseKeys(this.#aead, this.#enc, this.#secret, nonce);
    this.#base = base.slice();
    this.#decrypt = await decryptionBy(this.#aead, key);
  }

  /** @param {Uint8Array} sealed @param {Uint8Array} aad */
  async #open(sealed, aad) {
    const nonce = this.#base.slice();
    const counter = uint(this.#index, nonce.length); // a number is exact up to 2^53, and no message has that many chunks
    for (let i = 0; i < nonce.length; i++) nonce[i] ^= counter[i];
    if (!this.#decrypt) throw new UsedError("this message has no nonce yet");
    try {
      return await this.#decrypt(sealed, nonce, aad);
    } catch (cause) {
      throw new AlteredError(`chunk ${this.#index} does not open`, { cause });
    } finally {
      this.#index += 1;
    }
  }
}

/**
 * AES by WebCrypto, whose key is imported once; ChaCha20, which it lacks, by hpke-js.
 * @param {import("./keys.js").Aead} aead @param {Uint8Array} key @returns {Promise<(sealed: any, iv: any, additionalData: any) => Promise<Uint8Array>>}
 */
async function decryptionBy(aead, key) {
  if (aead.name.startsWith("aes-")) {
    const imported = await crypto.subtle.importKey("raw", /** @type {BufferSource} */ (key), "AES-GCM", false, ["decrypt"]);
    return async (sealed, iv, additionalData) =>
      new Uint8Array(await crypto.subtle.decrypt({ name: "AES-GCM", iv, additionalData }, imported, sealed));
  }
  const context = aead.make().createEncryptionContext(key.slice().buffer);
  return async (sealed, iv, aad) => new Uint8Array(await context.open(iv.slice().buffer, sealed.slice().buffer, aad.slice().buffer));
}
