"""The checksum that `lacre model` writes into each GGUF file that it makes. Damage is noticed before there is a signature.

    lacre.file.bytes    uint64   the size of the file
    lacre.file.sha256   string   64 digits: the SHA-256 of the file in hex, with zeros in place of these digits

Rules:
- Both are the first pairs of the metadata, so they go wherever the file goes. llama.cpp and other readers ignore them.
- Other programs copy the metadata into what they make of a file. That file has another size: its checksum counts as absent.
- It is no protection against an attacker, who can compute a new one. A signature is.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO, Final

from lacre.errors import SettingsError
from lacre_backend.engine import gguf_header
from lacre_backend.engine.gguf_header import Malformed

_NUMBER: Final = struct.Struct("<Q")
_COUNT_AT: Final = 16  # where a GGUF file says how many pairs it has
_PAIRS_AT: Final = 24  # where the first pair begins
_ZEROS: Final = b"0" * 64
_PIECE: Final = 2**23  # bytes that are moved or hashed at once


def _key(name: str, kind: int) -> bytes:
    """How a pair begins. kind: GGUF's type of its value."""
    return _NUMBER.pack(len(name)) + name.encode() + kind.to_bytes(4, "little")


_SIZE: Final = _key("lacre.file.bytes", 10)
_DIGEST: Final = _key("lacre.file.sha256", 8) + _NUMBER.pack(len(_ZEROS))
_SIZE_AT: Final = _PAIRS_AT + len(_SIZE)
_DIGITS_AT: Final = _SIZE_AT + _NUMBER.size + len(_DIGEST)
_END: Final = _DIGITS_AT + len(_ZEROS)


class DamagedModel(SettingsError):
    """A model file that changed since it was written."""


class Checksum:
    """Verifies a file's checksum while its bytes are read for another purpose, in order."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedModel if half of the checksum is missing, or OSError."""
        self._path = path
        self._size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_END)
        self._there = _is_there(path, head)
        self._said = head[_SIZE_AT : _SIZE_AT + _NUMBER.size], head[_DIGITS_AT:]
        self._digest, self._at = hashlib.sha256(), 0

    def update(self, piece: bytes) -> None:
        if self._there:
            self._digest.update(_hashed(self._size, piece, self._at))
            self._at += len(piece)

    def verified(self) -> bool:
        """False if the file has no checksum, or that of another file. Raises DamagedModel."""
        if not self._there:
            return False
        size, digits = self._said
        same_size, same_bytes = size == _NUMBER.pack(self._size), digits == self._digest.hexdigest().encode()
        if same_size != same_bytes:
            raise DamagedModel(
                f"{self._path} changed since `lacre model` wrote it: it has another checksum. Copy it again, or make it again."
            )
        return same_bytes


def write(path: Path) -> None:
    """Puts the checksum into a GGUF file, in place: a crash leaves a damaged file, so give a draft.

    Raises SettingsError if the file is not GGUF, or OSError.
    """
    with path.open("r+b") as file:
        if not _is_there(path, file.read(_END)):
            _make_room(path, file)
        size = os.fstat(file.fileno()).st_size
        file.seek(_PAIRS_AT)
        file.write(_SIZE + _NUMBER.pack(size) + _DIGEST + _ZEROS)
        file.seek(0)
        digest = hashlib.sha256()
        while piece := file.read(_PIECE):
            digest.update(piece)
        file.seek(_DIGITS_AT)
        file.write(digest.hexdigest().encode())


def _is_there(path: Path, head: bytes) -> bool:
    """head: the file up to `_END`, if it is that long. Raises DamagedModel."""
    size = head[_PAIRS_AT:_SIZE_AT] == _SIZE
    digest = head[_SIZE_AT + _NUMBER.size : _DIGITS_AT] == _DIGEST
    if size != digest:
        raise DamagedModel(f"{path} changed since `lacre model` wrote it: half of its checksum is missing. Copy it again.")
    return size


def _hashed(size: int, piece: bytes, at: int) -> bytes:
    """The piece as it is hashed: with the file's real size, and zeros for the digits. at: where it begins in the file."""
    if at >= _END:
        return piece
    for place, text in ((_SIZE_AT, _NUMBER.pack(size)), (_DIGITS_AT, _ZEROS)):
        begin, end = max(place, at), min(place + len(text), at + len(piece))
        if begin < end:
            piece = piece[: begin - at] + text[begin - place : end - place] + piece[end - at :]
    return piece


def _make_room(path: Path, file: BinaryIO) -> None:
    """Moves everything behind `_PAIRS_AT`, the tensors' data to its next aligned place, and counts two more pairs."""
    size = path.stat().st_size
    file.seek(0)
    try:
        head = gguf_header.read_from(file, size)
    except Malformed as exc:
        raise SettingsError(f"{path} is not a usable GGUF file: {exc}. Make it again.") from None
    head_end = file.tell()
    if any(key.startswith("lacre.file.") for key in head.metadata):
        raise SettingsError(f"{path} has the checksum of another file in an unexpected place. Make it again.")
    alignment = head.number("general.alignment") or gguf_header.DEFAULT_ALIGNMENT
    more = _END - _PAIRS_AT
    padding = -(head_end + more) % alignment
    by = head_end + more + padding - head.data_at
    for end in range(size, head.data_at, -_PIECE):
        _move(file, max(head.data_at, end - _PIECE), end, by)
    _move(file, _PAIRS_AT, head_end, more)
    file.write(bytes(padding))
    file.seek(_COUNT_AT)
    file.write(_NUMBER.pack(len(head.metadata) + 2))
    file.flush()


def _move(file: BinaryIO, begin: int, end: int, by: int) -> None:
    file.seek(begin)
    piece = file.read(end - begin)
    file.seek(begin + by)
    file.write(piece)
