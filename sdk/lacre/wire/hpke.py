"""HPKE in base mode (RFC 9180), with the KEMs X25519 and X-Wing (draft-ietf-hpke-pq) and HKDF-SHA256.

`cryptography` has a single-shot `hpke.Suite` without sequence numbers or exporter. This file adds the HPKE context, over the
same package's primitives: the sender's encapsulation, and the parts that both roles share. Decapsulation and key generation
need a long-lived private key and are in `opening.py`.

Rules:
- Every shared secret becomes exactly one key and base nonce, and every nonce is used once: the counter only rises.
- The KEM's randomness is drawn inside `encapsulate`. A caller can choose it only in `encapsulate_for_test_vectors`.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from lacre import errors
from lacre.wire.header import Aead, Kem, Suite

ByteView = bytes | bytearray | memoryview

_VERSION: Final = b"HPKE-v1"
_SHA256: Final = SHA256()
_MODE_BASE: Final = b"\x00"
_ZERO_SECRET: Final = bytes(32)
_XWING_LABEL: Final = bytes.fromhex("5c2e2f2f5e5c")  # \.//^\
_MLKEM_PK: Final = 1184
# HKDF-Expand's own limit (RFC 5869 section 2.3).
MAX_EXPORT: Final = 255 * 32


# KDF, RFC 9180 section 4


def extract(salt: bytes, ikm: bytes) -> bytes:
    return HKDF.extract(_SHA256, salt, ikm)


def expand(prk: bytes, info: bytes, length: int) -> bytes:
    return HKDFExpand(_SHA256, length, info).derive(prk)


def labeled_extract(suite_id: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return extract(salt, _VERSION + suite_id + label + ikm)


def labeled_expand(suite_id: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(prk, length.to_bytes(2, "big") + _VERSION + suite_id + label + info, length)


# KEM, RFC 9180 section 4.1 and draft-ietf-hpke-pq


def kem_suite_id(kem: Kem) -> bytes:
    return b"KEM" + kem.to_bytes(2, "big")


def encapsulate(kem: Kem, public_key: bytes) -> tuple[bytes, bytes]:
    """A fresh shared secret (32 bytes) and `enc`, which carries it to the holder of `public_key`.

    Raises InvalidMessage if the public key is invalid, and UnsupportedSuite if the crypto library lacks ML-KEM.
    """
    return encapsulate_for_test_vectors(kem, public_key, X25519PrivateKey.generate())


def encapsulate_for_test_vectors(kem: Kem, public_key: bytes, ephemeral: X25519PrivateKey) -> tuple[bytes, bytes]:
    """`encapsulate` with a given X25519 ephemeral key. Using one twice loses the secrecy of both messages."""
    enc_x = ephemeral.public_key().public_bytes_raw()
    try:
        if kem is Kem.X25519:
            dh = x25519(ephemeral, public_key)
            return dhkem_secret(dh, enc_x, public_key), enc_x
        secret_m, enc_m = MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PK]).encapsulate()
        public_x = public_key[_MLKEM_PK:]
        return xwing_secret(secret_m, x25519(ephemeral, public_x), enc_x, public_x), enc_m + enc_x
    except ValueError:
        # Wrong length, an ML-KEM coefficient out of range (FIPS 203 section 7.2), or a low-order point.
        raise errors.InvalidMessage("the key configuration holds an invalid public key; fetch it again") from None
    except UnsupportedAlgorithm:
        raise missing_mlkem() from None


def x25519(private_key: X25519PrivateKey, public_key: bytes) -> bytes:
    """The Diffie-Hellman output. Raises ValueError for a low-order point.

    RFC 9180 section 7.1.4: an all-zero output must be refused. OpenSSL does; the check here holds for any backend.
    """
    shared = private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    if hmac.compare_digest(shared, _ZERO_SECRET):
        raise ValueError("all-zero shared secret")
    return shared


def dhkem_secret(dh: bytes, enc: bytes, public_key: bytes) -> bytes:
    """ExtractAndExpand of DHKEM(X25519, HKDF-SHA256), RFC 9180 section 4.1."""
    suite_id = kem_suite_id(Kem.X25519)
    prk = labeled_extract(suite_id, b"", b"eae_prk", dh)
    return labeled_expand(suite_id, prk, b"shared_secret", enc + public_key, 32)


def xwing_secret(secret_m: bytes, secret_x: bytes, enc_x: bytes, public_x: bytes) -> bytes:
    """X-Wing's combiner (draft-connolly-cfrg-xwing-kem). ML-KEM's secret commits to its ciphertext, which is not hashed."""
    return hashlib.sha3_256(secret_m + secret_x + enc_x + public_x + _XWING_LABEL).digest()


def missing_mlkem() -> errors.UnsupportedSuite:
    return errors.UnsupportedSuite(
        "this build of `cryptography` has no ML-KEM-768; install its wheel, or build it against OpenSSL 3.5 or later"
    )


# Key schedule and contexts, RFC 9180 sections 5.1 and 5.2


class SequencedAead:
    """An AEAD key with a base nonce and a counter: chunk i is sealed under `base_nonce XOR i`.

    HPKE's contexts (RFC 9180 section 5.2) and the response keys of chunked OHTTP (section 6.2) count alike, so both use this.
    The counter cannot wrap around: `to_bytes` raises before the nonce would repeat, after 2^96 messages.
    """

    __slots__ = ("_aead", "_base_nonce", "_sequence")

    def __init__(self, aead: Aead, key: bytes, base_nonce: bytes) -> None:
        self._aead = ChaCha20Poly1305(key) if aead is Aead.CHACHA20_POLY1305 else AESGCM(key)
        self._base_nonce = int.from_bytes(base_nonce, "big")
        self._sequence = 0

    def _nonce(self) -> bytes:
        return (self._base_nonce ^ self._sequence).to_bytes(12, "big")

    def seal(self, plaintext: ByteView, aad: bytes = b"") -> bytes:
        sealed = self._aead.encrypt(self._nonce(), plaintext, aad)
        self._sequence += 1
        return sealed

    def seal_into(self, plaintext: ByteView, aad: bytes, out: memoryview) -> None:
        """`seal` into a writable view of exactly the right length, without a copy."""
        self._aead.encrypt_into(self._nonce(), plaintext, aad, out)
        self._sequence += 1

    def open(self, ciphertext: ByteView, aad: bytes = b"") -> bytes:
        """Raises OpenError; the counter then does not move, as RFC 9180 section 5.2 asks."""
        try:
            plaintext = self._aead.decrypt(self._nonce(), ciphertext, aad)
        except InvalidTag:
            raise _did_not_open() from None
        self._sequence += 1
        return plaintext

    def open_into(self, ciphertext: ByteView, aad: bytes, out: memoryview) -> None:
        """`open` into a writable view of exactly the right length. After OpenError, its content must not be used."""
        try:
            self._aead.decrypt_into(self._nonce(), ciphertext, aad, out)
        except InvalidTag:
            raise _did_not_open() from None
        self._sequence += 1


def _did_not_open() -> errors.OpenError:
    return errors.OpenError("a sealed chunk did not open: it was altered, is out of order, or was sealed to another key")


class KeySchedule:
    """What RFC 9180 section 5.1 derives from a shared secret and `info`, in base mode. `suite_id` is HPKE's own."""

    __slots__ = ("_context", "_secret", "_suite_id")

    def __init__(self, suite_id: bytes, shared_secret: bytes, info: bytes) -> None:
        psk_id_hash = labeled_extract(suite_id, b"", b"psk_id_hash", b"")
        info_hash = labeled_extract(suite_id, b"", b"info_hash", info)
        self._suite_id = suite_id
        self._context = _MODE_BASE + psk_id_hash + info_hash
        self._secret = labeled_extract(suite_id, shared_secret, b"secret", b"")

    def derive(self, label: bytes, length: int) -> bytes:
        """label: `key`, `base_nonce` or `exp`."""
        return labeled_expand(self._suite_id, self._secret, label, self._context, length)


def export(suite_id: bytes, exporter_secret: bytes, context: bytes, length: int) -> bytes:
    """RFC 9180 section 5.3."""
    if not 0 < length <= MAX_EXPORT:
        raise errors.UsageError(f"HPKE exports 1 to {MAX_EXPORT} bytes")
    return labeled_expand(suite_id, exporter_secret, b"sec", context, length)


class Context:
    """One side of an HPKE exchange. The sender uses `aead` only to seal, the recipient only to open."""

    __slots__ = ("_exporter_secret", "_suite_id", "aead")

    def __init__(self, suite: Suite, shared_secret: bytes, info: bytes) -> None:
        self._suite_id = b"HPKE" + b"".join(part.to_bytes(2, "big") for part in (suite.kem, suite.kdf, suite.aead))
        schedule = KeySchedule(self._suite_id, shared_secret, info)
        key = schedule.derive(b"key", suite.aead.n_key)
        self.aead = SequencedAead(suite.aead, key, schedule.derive(b"base_nonce", suite.aead.n_nonce))
        self._exporter_secret = schedule.derive(b"exp", 32)

    def export(self, context: bytes, length: int) -> bytes:
        """A secret that only both sides can derive (RFC 9180 section 5.3)."""
        return export(self._suite_id, self._exporter_secret, context, length)
