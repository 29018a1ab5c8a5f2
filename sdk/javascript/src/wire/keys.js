/** Keys and suites: sections 4 and 5 of docs/wire.md. HPKE itself is hpke-js. */

import { Chacha20Poly1305 } from "@hpke/chacha20poly1305";
import { Aes128Gcm, Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from "@hpke/core";
import { XWing } from "@hpke/hybridkem-x-wing";

import { MalformedError, NoUsableKeyError } from "../errors.js";
import { concat, uint } from "./bytes.js";
import { SliceReader } from "./readers.js";

export const KDF_HKDF_SHA256 = 0x0001;

/** @typedef {{ name: string, label: string, publicKeySize: number, encSize: number, make: () => any }} Kem */
/** @typedef {{ name: string, keySize: number, nonceSize: number, make: () => any }} Aead */
/** @typedef {{ keyId: number, kemId: number, kem: Kem, aeadId: number, aead: Aead, publicKey: Uint8Array }} KeyConfiguration */

/** @type {Map<number, Kem>} */
export const KEMS = new Map([
  [0x647a, { name: "xwing", label: "MLKEM768-X25519", publicKeySize: 1216, encSize: 1120, make: () => new XWing() }],
  [0x0020, { name: "x25519", label: "X25519", publicKeySize: 32, encSize: 32, make: () => new DhkemX25519HkdfSha256() }],
]);

/** In the order in which a client prefers them. @type {Map<number, Aead>} */
export const AEADS = new Map([
  [0x0002, { name: "aes-256-gcm", keySize: 32, nonceSize: 12, make: () => new Aes256Gcm() }],
  [0x0003, { name: "chacha20-poly1305", keySize: 32, nonceSize: 12, make: () => new Chacha20Poly1305() }],
  [0x0001, { name: "aes-128-gcm", keySize: 16, nonceSize: 12, make: () => new Aes128Gcm() }],
]);

export const TAG_SIZE = 16;

/**
 * One key configuration (RFC 9458 section 3.1). `aead` is the one that this client takes. null if KEM, KDF or AEAD are unknown:
 * a client skips such a configuration, and a malformed one is an error.
 * @param {Uint8Array} bytes @returns {KeyConfiguration | null}
 */
export function parseKeyConfiguration(bytes) {
  const reader = new SliceReader(bytes);
  const keyId = reader.uint(1);
  const kemId = reader.uint(2);
  const kem = KEMS.get(kemId);
  if (!kem) return null; // the length of its key is unknown, so nothing behind it can be read
  const publicKey = reader.take(kem.publicKeySize);
  const length = reader.uint(2);
  if (length === 0 || length % 4 !== 0 || length !== reader.left) {
    throw new MalformedError("the algorithms of a key configuration do not fill their length");
  }
  const offered = new Set();
  while (reader.left > 0) {
    const kdfId = reader.uint(2);
    const aeadId = reader.uint(2);
    if (kdfId === KDF_HKDF_SHA256) offered.add(aeadId);
  }
  const found = [...AEADS].find(([id]) => offered.has(id));
  return found === undefined ? null : { keyId, kemId, kem, aeadId: found[0], aead: found[1], publicKey };
}

/** @param {{ kem: Kem, aead: Aead }} config */
export function suiteOf({ kem, aead }) {
  return new CipherSuite({ kem: kem.make(), kdf: new HkdfSha256(), aead: aead.make() });
}

/** hdr of section 6. @param {{ keyId: number, kemId: number, aeadId: number }} config */
export function headerOf({ keyId, kemId, aeadId }) {
  return concat([uint(keyId, 1), uint(kemId, 2), uint(KDF_HKDF_SHA256, 2), uint(aeadId, 2)]);
}

/**
 * HPKE's sender half. hpke-js and WebCrypto refuse what section 5 asks to refuse: an all-zero X25519 output, in X-Wing too, and an
 * ML-KEM key that fails FIPS 203's check.
 * @param {KeyConfiguration} config @param {Uint8Array<ArrayBuffer>} info
 */
export async function setupSender(config, info) {
  const suite = suiteOf(config);
  try {
    const recipientPublicKey = await suite.kem.deserializePublicKey(config.publicKey.slice().buffer);
    return await suite.createSenderContext({ recipientPublicKey, info: info.buffer });
  } catch (cause) {
    throw new NoUsableKeyError("nothing can be sealed to this public key", { cause });
  }
}
