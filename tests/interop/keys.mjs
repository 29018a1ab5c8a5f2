/** Keys and suites: sections 4 and 5 of wire.md. HPKE itself is hpke-js. */

import { Chacha20Poly1305 } from "@hpke/chacha20poly1305";
import { Aes128Gcm, Aes256Gcm, CipherSuite, HkdfSha256 } from "@hpke/core";
import { DhkemX25519HkdfSha256 } from "@hpke/dhkem-x25519";
import { XWing } from "@hpke/hybridkem-x-wing";

import { concat, SliceReader, uint } from "./bytes.mjs";
import { MalformedError, NoUsableKeyError } from "./errors.mjs";

export const KDF_HKDF_SHA256 = 0x0001;

export const KEMS = new Map([
  [0x647a, { name: "xwing", publicKeySize: 1216, encSize: 1120, make: () => new XWing() }],
  [0x0020, { name: "x25519", publicKeySize: 32, encSize: 32, make: () => new DhkemX25519HkdfSha256() }],
]);

/** In the order in which a client prefers them. */
export const AEADS = new Map([
  [0x0002, { cipher: "aes-256-gcm", keySize: 32, nonceSize: 12, make: () => new Aes256Gcm() }],
  [0x0003, { cipher: "chacha20-poly1305", keySize: 32, nonceSize: 12, make: () => new Chacha20Poly1305() }],
  [0x0001, { cipher: "aes-128-gcm", keySize: 16, nonceSize: 12, make: () => new Aes128Gcm() }],
]);

export const TAG_SIZE = 16;

/**
 * One key configuration (RFC 9458 section 3.1). `aead` is the one this client takes; the result is null where KEM, KDF or AEAD
 * are none that it knows: such a configuration is passed over, a malformed one is an error.
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
  const aeadId = [...AEADS.keys()].find((id) => offered.has(id));
  return aeadId === undefined ? null : { keyId, kemId, kem, aeadId, aead: AEADS.get(aeadId), publicKey };
}

export function suiteOf({ kem, aead }) {
  return new CipherSuite({ kem: kem.make(), kdf: new HkdfSha256(), aead: aead.make() });
}

/** hdr of section 6. */
export function headerOf({ keyId, kemId, aeadId }) {
  return concat(uint(keyId, 1), uint(kemId, 2), uint(KDF_HKDF_SHA256, 2), uint(aeadId, 2));
}

/**
 * HPKE's sender half. hpke-js refuses what section 5 asks to refuse: an all-zero X25519 output, in X-Wing too, and an ML-KEM key
 * that fails FIPS 203's check.
 */
export async function setupSender(config, info) {
  const suite = suiteOf(config);
  try {
    const recipientPublicKey = await suite.kem.deserializePublicKey(config.publicKey);
    return await suite.createSenderContext({ recipientPublicKey, info });
  } catch (cause) {
    throw new NoUsableKeyError("nothing can be sealed to this public key", { cause });
  }
}
