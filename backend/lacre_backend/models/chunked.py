"""Random access to a message of C2SP *chunked-encryption*, Cobblestone-256 (c2sp.org/chunked-encryption).

`cryptography.cobblestone` writes such messages, and reads them from begin to end only. llama.cpp jumps in the files it loads.

Rules: the commitment is checked before any chunk is opened, and the last chunk before any other: it authenticates the length.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA512, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from lacre.errors import VerificationError
from lacre.wire.wiping import overwrite

CHUNK: Final = 2**14  # bytes of a chunk's text
KEY: Final = 32
TAG: Final = 16
AT_ONCE: Final = 64  # chunks read from the disk together
_RECORD: Final = CHUNK + TAG
_SALT: Final = 24
_COMMITMENT: Final = 32
PREFIX: Final = _SALT + _COMMITMENT  # bytes before the first chunk
_NONCE: Final = 12
_LABEL: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"


class SealedModelInvalid(VerificationError):
    """A sealed model that does not open: damaged, cut off, edited, or sealed with another key."""

    remedy = "Copy the sealed model again, or seal the model again."


def sealed_size(size: int) -> int:
    """Bytes of a message with `size` bytes of text."""
    return PREFIX + size + TAG * (size // CHUNK + 1)


class ChunkedReader:
    """Every byte that it gives out is authenticated."""

    def __init__(
        self, file: int, at: int, size: int, key: bytes | bytearray, *, context: bytes, algorithm: HashAlgorithm | None = None
    ) -> None:
        """file: a descriptor, which stays open as long as this object is used. at: where the message begins in it.

        size: bytes of the text, which the message must have exactly. algorithm: of HKDF; Cobblestone has SHA-512.
        Raises SealedModelInvalid, or OSError.
        """
        self.size = size
        if os.fstat(file).st_size - at != sealed_size(size):
            raise SealedModelInvalid(f"the sealed model is cut off, or too long for its {size:,} bytes")
        if len(key) != KEY:
            raise SealedModelInvalid(f"the key of the sealed model has {len(key)} bytes; it must have {KEY}")
        prefix = os.pread(file, PREFIX, at)
        expand = HKDFExpand(algorithm or SHA512(), KEY + _NONCE + _COMMITMENT, _LABEL + prefix[:_SALT] + context)
        derived = bytearray(KEY + _NONCE + _COMMITMENT)
        expand.derive_into(key, derived)
        try:
            if not bytes_eq(bytes(derived[KEY + _NONCE :]), prefix[_SALT:]):
                raise SealedModelInvalid("the sealed model does not open: its head was edited, or its key is another")
            with memoryview(derived)[:KEY] as cipher_key:
                self._cipher: AESGCM | None = AESGCM(cipher_key)
            self._nonce = int.from_bytes(derived[KEY : KEY + _NONCE], "big")
        finally:
            overwrite(derived)
        self._file = file
        self._at = at + PREFIX
        self._sealed = bytearray(AT_ONCE * _RECORD)
        self._text = bytearray(CHUNK)  # the chunk in which a read began or ended
        self._held = -1  # its number
        self._held_length = 0
        self._hold(size // CHUNK)

    def read_into(self, at: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `at` on. Raises SealedModelInvalid, or OSError."""
        if at < 0 or at + len(target) > self.size:
            raise SealedModelInvalid("llama.cpp asked for bytes beyond the model's end: the model's head is damaged")
        done = 0
        while done < len(target):
            number, within = divmod(at + done, CHUNK)
            whole = (len(target) - done) // CHUNK if within == 0 else 0
            if whole:
                count = min(whole, AT_ONCE)
                self._open(number, count, target[done : done + count * CHUNK])
                done += count * CHUNK
                continue
            self._hold(number)
            part = min(self._held_length - within, len(target) - done)
            target[done : done + part] = memoryview(self._text)[within : within + part]
            done += part

    def close(self) -> None:
        """Overwrites the text that it holds, and drops the key. It reads nothing more."""
        overwrite(self._text)
        self._cipher = None
        self._held = -1

    def _hold(self, number: int) -> None:
        if self._held == number:
            return
        self._held = -1
        length = min(CHUNK, self.size - number * CHUNK)
        self._open(number, 1, memoryview(self._text)[:length])
        self._held, self._held_length = number, length

    def _open(self, number: int, count: int, target: memoryview) -> None:
        """Opens `count` chunks; if there are several, all are whole."""
        sealed = memoryview(self._sealed)[: len(target) + count * TAG]
        if os.preadv(self._file, [sealed], self._at + number * _RECORD) != len(sealed):
            raise SealedModelInvalid("the sealed model was cut off while it was read")
        size, cipher = len(target) // count, self._cipher
        if cipher is None:
            raise SealedModelInvalid("the sealed model is closed")
        try:
            for i in range(count):
                nonce = (self._nonce ^ (number + i)).to_bytes(_NONCE, "big")
                record = sealed[i * (size + TAG) : (i + 1) * (size + TAG)]
                cipher.decrypt_into(nonce, record, None, target[i * size : (i + 1) * size])
        except InvalidTag:
            raise SealedModelInvalid(f"chunk {number + i} of the sealed model is damaged or edited") from None
