"""A sealed model: a GGUF file encrypted at rest. Its key is wrapped by a key management service (KMS).

The file is `MAGIC`, two blocks of JSON, each after its length (4 bytes, big-endian), and a message. The message is one of C2SP
*chunked-encryption*, Cobblestone-256: AES-256-GCM in chunks of 16 KiB, with key commitment and random access.
- The first block describes the model: name, digest, size, and the model's signature, if it has one. It is the context of
  the message: if a byte of it changes, nothing opens.
- The second block is the wrapped input key, with the purpose `model` and the digest as encryption context. `rewrap` replaces
  this block alone.

Rules: every length is checked before its bytes are read. No chunk is given out before it is authenticated.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from cryptography.cobblestone import Cobblestone256Encryptor

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime.json_objects import parse_object
from lacre.wire.wiping import overwrite
from lacre_backend.engine import gguf_header
from lacre_backend.models.chunked import AT_ONCE, CHUNK, KEY, ChunkedReader, SealedModelInvalid, sealed_size
from lacre_backend.models.signatures import MAX_BUNDLE
from lacre_fabric.keys.kms import EncryptionContext, Kms, WrongWrapping

MAGIC: Final = b"lacre sealed model 1\n"
_CONTEXT: Final = b"lacre sealed model 1\0"
_LENGTH: Final = struct.Struct(">I")
_MAX_ABOUT: Final = 2 * MAX_BUNDLE  # bytes of the first block: the signature in base64, and some text
_MAX_WRAPPED: Final = 2**16  # bytes of the second block; services wrap 32 bytes in some 300
_PIECE: Final = AT_ONCE * CHUNK


@dataclass(frozen=True, slots=True)
class About:
    """The model in a sealed file. digest: `sha256:` and hex. size: bytes. signature: its bundle, or empty."""

    name: str
    digest: str
    size: int
    signature: bytes = b""

    def encode(self) -> bytes:
        members = {
            "name": self.name,
            "digest": self.digest,
            "size": self.size,
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(members, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> About:
        """Raises SealedModelInvalid."""
        try:
            members = parse_object(data, "the head of the sealed model", once=True)
            about = cls(
                name=members["name"],
                digest=members["digest"],
                size=members["size"],
                signature=base64.b64decode(members["signature"], validate=True),
            )
        except (InvalidMessage, KeyError, TypeError, ValueError):
            raise SealedModelInvalid("the head of the sealed model is damaged") from None
        if (
            not isinstance(about.name, str)
            or not isinstance(about.digest, str)
            or type(about.size) is not int
            or about.size < 0
        ):
            raise SealedModelInvalid("the head of the sealed model is damaged")
        return about

    @property
    def context(self) -> EncryptionContext:
        return EncryptionContext("model", "", digest=self.digest)


@dataclass(frozen=True, slots=True)
class SealedHead:
    """The readable part of a sealed model. core: the bytes of the first block. at: where the message begins."""

    about: About
    core: bytes
    scheme: str
    wrapped: bytes
    at: int


def message_context(core: bytes) -> bytes:
    """Binds the message to the first block."""
    return _CONTEXT + hashlib.sha256(core).digest()


def is_sealed(path: Path) -> bool:
    """Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_head(path: Path) -> SealedHead:
    """Nothing is opened. Raises SealedModelInvalid, or OSError."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise SealedModelInvalid(f"{path} is no sealed model")
        core = _block(file, _MAX_ABOUT)
        wrapped = _block(file, _MAX_WRAPPED)
        about = About.parse(core)
        try:
            members = parse_object(wrapped, "the wrapped key", once=True)
            head = SealedHead(about, core, str(members["by"]), b64u_decode(members["wrapped"]), file.tell())
        except (InvalidMessage, KeyError, TypeError, ValueError):
            raise SealedModelInvalid("the wrapped key of the sealed model is damaged") from None
        size = os.fstat(file.fileno()).st_size - head.at
    if size != sealed_size(about.size):
        raise SealedModelInvalid(f"{path} is cut off, or too long: its head names {about.size:,} bytes of the model")
    return head


def seal(source: Path, out: BinaryIO, about: About, kms: Kms) -> Iterator[int]:
    """Writes the sealed form of `source`. Yields the bytes that are done.

    Raises SealedModelInvalid if the file changed since its digest was taken; KmsError, SettingsError or OSError.
    """
    key = bytearray(os.urandom(KEY))
    core = about.encode()
    try:
        wrapped = kms.wrap(key, about.context)
        encryptor = Cobblestone256Encryptor(key, message_context(core))
    finally:
        overwrite(key)
    out.write(MAGIC)
    for block in (core, _wrapped(kms.scheme, wrapped)):
        out.write(_LENGTH.pack(len(block)) + block)
    digest, done = hashlib.sha256(), 0
    with source.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            out.write(encryptor.update(piece))
            done += len(piece)
            yield done
    out.write(encryptor.finalize())
    if "sha256:" + digest.hexdigest() != about.digest:
        raise SealedModelInvalid(f"{source} changed while it was sealed: seal it again")


def rewrap(source: Path, out: BinaryIO, old: Kms, new: Kms) -> None:
    """Writes the same sealed model with its key wrapped by `new`. Raises as `seal`, and WrongWrapping."""
    head = read_head(source)
    key = _unwrapped(head, old)
    try:
        wrapped = new.wrap(key, head.about.context)
    finally:
        overwrite(key)
    out.write(MAGIC)
    for block in (head.core, _wrapped(new.scheme, wrapped)):
        out.write(_LENGTH.pack(len(block)) + block)
    with source.open("rb") as file:
        file.seek(head.at)
        while piece := file.read(_PIECE):
            out.write(piece)


class SealedWeights:
    """A sealed model, opened for llama.cpp. head: a file in memory with the model's head alone, for all that reads no weights.

    Its size is the model's, but the place of the weights is empty. It exists as long as this object.
    """

    def __init__(self, path: Path, kms: Kms) -> None:
        """Raises SealedModelInvalid, WrongWrapping or another KmsError, SettingsError, or OSError."""
        head = read_head(path)
        self.about = head.about
        self.size = head.about.size
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, file)
        self._reader = self._opened(file, head, kms)
        in_memory = os.memfd_create("model-head", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, in_memory)
        try:
            self._write_head(in_memory, path)
        except gguf_header.Malformed as exc:
            raise SealedModelInvalid(f"{path} holds no usable GGUF file: {exc}") from None
        self.head = Path(f"/proc/self/fd/{in_memory}")

    def read_into(self, at: int, target: memoryview) -> None:
        """As `ChunkedReader`. Raises the same; and SettingsError after `loaded`."""
        if not self._close.alive:
            raise SettingsError("The sealed model was loaded once, and is closed. Open it again.")
        self._reader.read_into(at, target)

    def check(self) -> None:
        """Opens every chunk, and compares the digest that the head names. Raises SealedModelInvalid."""
        digest, text = hashlib.sha256(), bytearray(_PIECE)
        with memoryview(text) as piece:
            for at in range(0, self.size, _PIECE):
                part = piece[: min(_PIECE, self.size - at)]
                self.read_into(at, part)
                digest.update(part)
        overwrite(text)
        if "sha256:" + digest.hexdigest() != self.about.digest:
            raise SealedModelInvalid("the sealed model has another digest than its head names")

    def loaded(self) -> None:
        """Closes the sealed file, and overwrites its text. The head stays."""
        self._reader.close()
        self._close()

    def _opened(self, file: int, head: SealedHead, kms: Kms) -> ChunkedReader:
        key = _unwrapped(head, kms)
        try:
            return ChunkedReader(file, head.at, head.about.size, key, context=message_context(head.core))
        finally:
            overwrite(key)

    def _write_head(self, in_memory: int, path: Path) -> None:
        text = io.BufferedReader(_Text(self._reader), AT_ONCE * CHUNK)
        length = gguf_header.read_from(text, self.size).data_at
        at = 0
        while at < min(length, self.size):
            piece = memoryview(bytearray(min(AT_ONCE * CHUNK, length - at, self.size - at)))
            self._reader.read_into(at, piece)
            at += os.write(in_memory, piece)
        os.ftruncate(in_memory, self.size)
        state = path.stat()
        os.utime(in_memory, ns=(state.st_atime_ns, state.st_mtime_ns))


class _Text(io.RawIOBase):
    """The text of a sealed model as a file of Python's."""

    def __init__(self, reader: ChunkedReader) -> None:
        self._reader = reader
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        size = max(min(len(view), self._reader.size - self._at), 0)
        self._reader.read_into(self._at, view[:size])
        self._at += size
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._reader.size)[whence])
        return self._at


def _block(file: BinaryIO, most: int) -> bytes:
    length = file.read(_LENGTH.size)
    if len(length) == _LENGTH.size and (size := _LENGTH.unpack(length)[0]) <= most and len(data := file.read(size)) == size:
        return data
    raise SealedModelInvalid("the head of the sealed model is damaged")


def _wrapped(scheme: str, wrapped: bytes) -> bytes:
    return json.dumps({"by": scheme, "wrapped": b64u(wrapped)}, separators=(",", ":")).encode()


def _unwrapped(head: SealedHead, kms: Kms) -> bytearray:
    if head.scheme != kms.scheme:
        raise WrongWrapping(f"the model's key was wrapped by {head.scheme}:, but `kms` is {kms.scheme}:")
    return kms.unwrap(head.wrapped, head.about.context)
