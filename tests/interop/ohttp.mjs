/** Chunked Oblivious HTTP, the client's side: sections 6 to 8 of wire.md (draft-ietf-ohai-chunked-ohttp-08 over RFC 9458). */

import { createDecipheriv, createHash, createHmac } from "node:crypto";

import { ascii, concat, StreamReader, varint } from "./bytes.mjs";
import { AlteredError, MalformedError, TooLargeError, TruncatedError, UsedError } from "./errors.mjs";
import { headerOf, setupSender, TAG_SIZE } from "./keys.mjs";

export const MEDIA_TYPE_REQUEST = "message/ohttp-chunked-req";
export const MEDIA_TYPE_RESPONSE = "message/ohttp-chunked-res";

export const MAX_CHUNK = 16384;
export const MAX_REQUEST_CHUNKS = 8192;
export const MAX_SEALED_REQUEST = 7 * 1024 * 1024;

const LABEL_REQUEST = ascii("message/bhttp chunked request");
const LABEL_RESPONSE = ascii("message/bhttp chunked response");
const FINAL = ascii("final");
const NONE = new Uint8Array();

/** HKDF of RFC 5869 with SHA-256, in its two stages. */
export const hkdfExtract = (salt, ikm) => createHmac("sha256", salt).update(ikm).digest();
export function hkdfExpand(prk, info, size) {
  let block = NONE;
  let out = NONE;
  for (let i = 1; out.length < size; i++) {
    block = createHmac("sha256", prk).update(block).update(info).update(Uint8Array.of(i)).digest();
    out = concat(out, block);
  }
  return out.subarray(0, size);
}

export const requestInfo = (hdr) => concat(LABEL_REQUEST, Uint8Array.of(0), hdr);

/** L of section 7: the size of the response's nonce, and of the secret exported for it. */
export const responseSecretSize = (aead) => Math.max(aead.nonceSize, aead.keySize);

/** One request to one key, and the opening of its one response. */
export class SealedRequest {
  #config;
  #hdr;
  #context;
  #state = "fresh";

  constructor(config, hdr, context) {
    this.#config = config;
    this.#hdr = hdr;
    this.#context = context;
    this.enc = new Uint8Array(context.enc);
  }

  /** A fresh encapsulation to a parsed key configuration: every attempt needs its own (section 6). */
  static async to(config) {
    const hdr = headerOf(config);
    return new SealedRequest(config, hdr, await setupSender(config, requestInfo(hdr)));
  }

  /** SHA-256 of hdr ‖ enc: the name of this request in grants and receipts. */
  get digest() {
    return Uint8Array.from(createHash("sha256").update(this.#hdr).update(this.enc).digest());
  }

  /**
   * The sealed body, piece by piece; `source` gives the plaintext in any portions. Chunks are full but for the last
   * (section 8), and what would be too long is refused before it is sealed.
   */
  async *seal(source) {
    this.#step("fresh", "sealing");
    let size = this.#hdr.length + this.enc.length;
    let chunks = 0;
    yield concat(this.#hdr, this.enc);
    for await (const [chunk, last] of fullChunks(source)) {
      const prefix = varint(last ? 0 : chunk.length + TAG_SIZE);
      size += prefix.length + chunk.length + TAG_SIZE;
      chunks += 1;
      if (chunks > MAX_REQUEST_CHUNKS) throw new TooLargeError(`a request has at most ${MAX_REQUEST_CHUNKS} chunks`);
      if (size > MAX_SEALED_REQUEST) throw new TooLargeError(`a sealed request has at most ${MAX_SEALED_REQUEST} bytes`);
      const sealed = await this.#context.seal(chunk, last ? FINAL : NONE);
      yield concat(prefix, new Uint8Array(sealed));
    }
    this.#step("sealing", "sealed");
  }

  /** The reader of this request's response. Only when the whole request is sealed, and once. */
  async opener() {
    this.#step("sealed", "used");
    const size = responseSecretSize(this.#config.aead);
    const secret = new Uint8Array(await this.#context.export(LABEL_RESPONSE, size));
    return new ResponseOpener(this.#config.aead, this.enc, secret);
  }

  #step(from, to) {
    if (this.#state !== from) throw new UsedError(`a request that is ${this.#state} cannot be ${to}`);
    this.#state = to;
  }
}

async function* fullChunks(source) {
  let held = NONE;
  for await (const part of source) {
    held = held.length ? concat(held, part) : part;
    // One byte more than a chunk is needed to know that the chunk is not the last.
    let at = 0;
    for (; held.length - at > MAX_CHUNK; at += MAX_CHUNK) yield [held.subarray(at, at + MAX_CHUNK), false];
    held = held.subarray(at);
  }
  yield [held, true];
}

/** The response's keys (section 7), which start from HPKE's export and the worker's nonce. */
export function responseKeys(aead, enc, secret, nonce) {
  const prk = hkdfExtract(concat(enc, nonce), secret);
  const key = hkdfExpand(prk, ascii("key"), aead.keySize);
  const base = hkdfExpand(prk, ascii("nonce"), aead.nonceSize);
  return { prk, key, base };
}

/** Opens the records of one response as they arrive: each is told as soon as it is there. Only `end` says that none is missing. */
export class ResponseOpener extends StreamReader {
  #aead;
  #enc;
  #secret;

  constructor(aead, enc, secret) {
    super();
    this.#aead = aead;
    this.#enc = enc;
    this.#secret = secret;
  }

  *read() {
    const nonce = yield* this.take(responseSecretSize(this.#aead));
    const { key, base } = responseKeys(this.#aead, this.#enc, this.#secret, nonce);
    for (let i = 0; ; i++) {
      const length = yield* this.lengthUpTo(MAX_CHUNK + TAG_SIZE, "a chunk");
      if (length === 0) {
        const final = yield* this.rest(MAX_CHUNK + TAG_SIZE, "the final chunk");
        if (final.length < TAG_SIZE) throw new TruncatedError("the message ends inside its final chunk");
        yield this.#open(key, base, i, FINAL, final);
        return;
      }
      if (length <= TAG_SIZE) throw new MalformedError("a chunk that is not final is empty");
      const sealed = yield* this.take(length);
      yield this.#open(key, base, i, NONE, sealed);
    }
  }

  #open(key, base, index, aad, sealed) {
    const nonce = Buffer.from(base);
    const counter = Buffer.alloc(nonce.length);
    counter.writeUIntBE(index, counter.length - 6, 6); // a number is exact up to 2^53, and no message has that many chunks
    for (let i = 0; i < nonce.length; i++) nonce[i] ^= counter[i];
    const decipher = createDecipheriv(this.#aead.cipher, key, nonce, { authTagLength: TAG_SIZE });
    const plain = sealed.length - TAG_SIZE;
    decipher.setAAD(aad, { plaintextLength: plain });
    decipher.setAuthTag(sealed.subarray(plain));
    const opened = decipher.update(sealed.subarray(0, plain));
    try {
      decipher.final();
    } catch (cause) {
      throw new AlteredError(`chunk ${index} does not open`, { cause });
    }
    return opened;
  }
}
