"""Everything that needs a private key: the worker's side of chunked Oblivious HTTP.

Only a worker's node, and the code that makes its keys, imports this file. Rules:

- A private key never shows in a repr or an error.
- A private key can be destroyed: this file overwrites every copy of it that it made, and OpenSSL overwrites its own.
- A response sealer exists only for a request whose final chunk has opened, and only one of it.
- A response is sealed under a fresh random nonce, drawn at one place: `RequestOpener.response_sealer`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from typing import Final, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lacre import errors
from lacre.wire import hpke, ohttp
from lacre.wire.chunks import ChunkOpener, seal_chunks
from lacre.wire.header import (
    ALL_ALGORITHMS,
    MAX_REQUEST_CHUNKS,
    MAX_SEALED_REQUEST,
    Aead,
    Kdf,
    Kem,
    KeyConfig,
    SealedHeader,
)
from lacre.wire.wiping import overwrite

_SECRET_LENGTH: Final = 32  # Nsk of X25519 and of X-Wing, whose private key is a seed
_MLKEM_CT: Final = 1088
_FORMAT: Final = b"lacre-key-1\n"


class PrivateKey:
    """The key pair behind one key configuration. It keeps its own copy of `secret`."""

    __slots__ = ("_mlkem", "_secret", "_x25519", "config")

    def __init__(
        self, key_id: int, kem: Kem, secret: hpke.ByteView, algorithms: tuple[tuple[Kdf, Aead], ...] = ALL_ALGORITHMS
    ) -> None:
        if len(secret) != _SECRET_LENGTH:
            raise errors.UsageError(f"a private key has {_SECRET_LENGTH} bytes")
        self._secret = bytearray(secret)
        self._mlkem: MLKEM768PrivateKey | None = None
        self._x25519: X25519PrivateKey | None
        if kem is Kem.X25519:
            self._x25519 = X25519PrivateKey.from_private_bytes(self._secret)
            public_key = self._x25519.public_key().public_bytes_raw()
        else:
            self._mlkem, self._x25519 = _xwing_keys(self._secret)
            public_key = self._mlkem.public_key().public_bytes_raw() + self._x25519.public_key().public_bytes_raw()
        self.config = KeyConfig(key_id, kem, public_key, algorithms)

    @classmethod
    def generate(cls, key_id: int, kem: Kem = Kem.XWING, algorithms: tuple[tuple[Kdf, Aead], ...] = ALL_ALGORITHMS) -> Self:
        secret = os.urandom(_SECRET_LENGTH)
        try:
            return cls(key_id, kem, secret, algorithms)
        finally:
            overwrite(secret)

    @classmethod
    def derive(cls, key_id: int, kem: Kem, ikm: bytes) -> Self:
        """DeriveKeyPair (RFC 9180 section 7.1.3; draft-ietf-hpke-pq). `ikm` holds at least 32 bytes of entropy."""
        suite_id = hpke.kem_suite_id(kem)
        if kem is Kem.X25519:
            prk = hpke.labeled_extract(suite_id, b"", b"dkp_prk", ikm)
            return cls(key_id, kem, hpke.labeled_expand(suite_id, prk, b"sk", b"", _SECRET_LENGTH))
        labeled = ikm + b"HPKE-v1" + suite_id + b"\x00\x0dDeriveKeyPair" + _SECRET_LENGTH.to_bytes(2, "big")
        return cls(key_id, kem, hashlib.shake_256(labeled).digest(_SECRET_LENGTH))

    def decapsulate(self, enc: bytes) -> bytes:
        """The shared secret that `enc` carries. Raises InvalidMessage for a low-order point.

        An altered ML-KEM ciphertext yields another secret, not an error (FIPS 203's implicit rejection): the first chunk then
        does not open. UsageError if the key was destroyed.
        """
        if self._x25519 is None:
            raise errors.UsageError("this private key was destroyed")
        try:
            if self._mlkem is None:
                dh = hpke.x25519(self._x25519, enc)
                return hpke.dhkem_secret(dh, enc, self.config.public_key)
            secret_m = self._mlkem.decapsulate(enc[:_MLKEM_CT])
            enc_x = enc[_MLKEM_CT:]
            return hpke.xwing_secret(secret_m, hpke.x25519(self._x25519, enc_x), enc_x, self.config.public_key[-32:])
        except ValueError:
            raise errors.InvalidMessage("the encapsulated key of the sealed request is invalid; seal it again") from None

    def destroy(self) -> None:
        """Overwrites the secret. The key opens nothing more; requests that it opened before can still be answered."""
        overwrite(self._secret)
        self._mlkem = self._x25519 = None  # OpenSSL overwrites a private key when it frees it

    def to_bytes(self) -> bytearray:
        """The whole key pair, secret: overwrite it after storing it."""
        if self._x25519 is None:
            raise errors.UsageError("this private key was destroyed")
        config = self.config
        pairs = b"".join(struct.pack(">HH", kdf, aead) for kdf, aead in config.algorithms)
        head = _FORMAT + struct.pack(">BH", config.key_id, config.kem)
        data = bytearray(len(head) + _SECRET_LENGTH + len(pairs))  # at its full size from the start: growing would leave copies
        data[: len(head)] = head
        data[len(head) : len(head) + _SECRET_LENGTH] = self._secret
        data[len(head) + _SECRET_LENGTH :] = pairs
        return data

    @classmethod
    def from_bytes(cls, data: hpke.ByteView) -> Self:
        """Reads the output of `to_bytes`. Raises SettingsError for anything else."""
        head = len(_FORMAT)
        pairs_at = head + 3 + _SECRET_LENGTH
        try:
            if data[:head] != _FORMAT:
                raise ValueError
            key_id, kem = struct.unpack_from(">BH", data, head)
            pairs = tuple((Kdf(kdf), Aead(aead)) for kdf, aead in struct.iter_unpack(">HH", data[pairs_at:]))
            return cls(key_id, Kem(kem), memoryview(data)[head + 3 : pairs_at], pairs)
        except (ValueError, struct.error, errors.UsageError):
            raise errors.SettingsError("this is not a private key that Lacre wrote; restore it or make a new one") from None

    def __repr__(self) -> str:
        return f"PrivateKey(key_id={self.config.key_id}, kem={self.config.kem.label})"


def _xwing_keys(secret: bytearray) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """draft-ietf-hpke-pq: expands the 32 bytes into ML-KEM's `d ‖ z` and the X25519 key."""
    seed = hashlib.shake_256(secret).digest(96)
    view = memoryview(seed)
    try:
        return MLKEM768PrivateKey.from_seed_bytes(view[:64]), X25519PrivateKey.from_private_bytes(view[64:])
    except UnsupportedAlgorithm:
        raise hpke.missing_mlkem() from None
    finally:
        overwrite(seed)


class RequestOpener:
    """Opens one sealed request as it arrives. keys: the private keys of the pool, by key id."""

    __slots__ = ("_buffer", "_chunks", "_closed", "_keys", "_secret", "_size", "complete", "header")

    def __init__(self, keys: Mapping[int, PrivateKey]) -> None:
        self._keys = keys
        self._buffer = b""
        self._size = 0
        self._chunks: ChunkOpener | None = None
        self._closed = False
        self._secret: bytes | None = None
        self.header: SealedHeader | None = None
        self.complete = False

    def feed(self, data: bytes) -> list[bytes]:
        """The plaintexts of the chunks that `data` completes.

        Raises UnknownKeyId, UnsupportedSuite, InvalidMessage, MessageTooLarge or OpenError; AlreadyUsedError after that.
        """
        rest = self._take(data)
        pieces = [] if self._chunks is None else self._chunks.feed(rest)
        self._closed = False
        return pieces

    def _take(self, data: bytes) -> bytes | memoryview:
        """The part of `data` that belongs to the chunks, once the header is complete. Closes the opener: only the caller opens
        it again.
        """
        if self._closed:
            raise errors.AlreadyUsedError("this request was read to its end, or did not open")
        self._closed = True  # until the call ends: an error leaves the opener closed
        self._size += len(data)
        if self._size > MAX_SEALED_REQUEST:
            raise errors.MessageTooLarge("a sealed request has at most 7 MiB")
        if self._chunks is not None:
            return data
        data = self._buffer + data if self._buffer else data
        try:
            self.header = SealedHeader.parse(data)
        except errors.TruncatedStream:  # the header is not complete yet
            self._buffer = data
            return b""
        self._buffer = b""
        self._chunks = self._start(self.header)
        return memoryview(data)[len(self.header.raw) :]

    def _start(self, header: SealedHeader) -> ChunkOpener:
        key = self._keys.get(header.key_id)
        if key is None or key.config.kem is not header.suite.kem:
            raise errors.UnknownKeyId("the request is sealed to a key that is not held here; fetch the manifest again")
        if not key.config.offers(header.suite):
            raise errors.UnsupportedSuite("the request uses a KDF or AEAD that its key configuration does not offer")
        context = hpke.Context(header.suite, key.decapsulate(header.enc), ohttp.request_info(header))
        self._secret = ohttp.response_secret(context, header.suite)
        return ChunkOpener(context.aead, MAX_REQUEST_CHUNKS)

    def close(self) -> list[bytes]:
        """The body has ended: opens its final chunk. Raises TruncatedStream or OpenError."""
        if self._closed:
            raise errors.AlreadyUsedError("this request was closed already, or did not open")
        self._closed = True
        pieces = self._started().close()
        self.complete = True
        return pieces

    def _open_whole(self, body: bytes) -> bytes:
        """`feed` and `close` in one, for a complete body: only `open_request` makes sure that nothing was fed before."""
        rest = self._take(body)
        plaintext = self._started().open_whole(rest)
        self.complete = True
        return plaintext

    def _started(self) -> ChunkOpener:
        if self._chunks is None:
            raise errors.TruncatedStream("the sealed request ended inside its header")
        return self._chunks

    def response_sealer(self) -> ResponseSealer:
        """The only sealer of the response, after the whole request has opened."""
        if self.header is None or not self.complete:
            raise errors.UsageError("the request has not opened to its end; there is nothing to answer")
        if self._secret is None:
            raise errors.AlreadyUsedError("this request already has its answer")
        secret, self._secret = self._secret, None
        return ResponseSealer(self.header, secret, os.urandom(ohttp.response_nonce_length(self.header.suite)))


def open_request(keys: Mapping[int, PrivateKey], body: bytes) -> tuple[bytes, SealedHeader, ResponseSealer]:
    """The plaintext of a whole sealed request, its header, and the sealer of its response."""
    opener = RequestOpener(keys)
    plaintext = opener._open_whole(body)
    sealer = opener.response_sealer()
    return plaintext, sealer.header, sealer


class ResponseSealer:
    """Seals one response, piece by piece. Take it from `RequestOpener.response_sealer`: a nonce must never be used twice."""

    __slots__ = ("_aead", "_prefix", "header")

    def __init__(self, header: SealedHeader, secret: bytes, nonce: bytes) -> None:
        self.header = header
        self._aead: hpke.SequencedAead | None = ohttp.response_aead(header, secret, nonce)
        self._prefix = nonce

    def seal(self, piece: bytes) -> bytes:
        """The sealed bytes of `piece`, as one record for each 16 KiB of it; the first call's begin with the nonce."""
        prefix, self._prefix = self._prefix, b""
        return seal_chunks(self._live_aead(), piece, final=False, prefix=prefix)

    def finish(self, piece: bytes = b"") -> bytes:
        """The rest of the sealed response, its final chunk last."""
        aead = self._live_aead()
        self._aead = None
        return seal_chunks(aead, piece, final=True, prefix=self._prefix)

    def _live_aead(self) -> hpke.SequencedAead:
        if self._aead is None:
            raise errors.AlreadyUsedError("this response is finished; each request has one answer")
        return self._aead
