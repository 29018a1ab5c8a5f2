"""Reads the head of a GGUF file: its metadata and the places of its tensors (ggml's docs/gguf.md). llama.cpp is not needed.

Rules:
- A length is checked before its data is read, so a hostile file takes neither memory nor time beyond the constants below.
- Items of arrays are skipped: a vocabulary has 260,000 of them. Only their type and count are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

MAX_METADATA: Final = 256 * 2**20  # bytes; vocabularies of 260,000 tokens with their merges take about 10 MiB
MAX_TENSORS: Final = 2**20  # the largest models in use have some 10,000
MAX_TEXT: Final = 2**24  # bytes of one text that is kept; chat templates have 100,000 at most
MAX_DIMENSIONS: Final = 4  # of a tensor, as in ggml
DEFAULT_ALIGNMENT: Final = 32  # bytes, where `general.alignment` is absent
MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)  # of the container; 1 is obsolete, and llama.cpp reads no later one

_HEADER: Final = struct.Struct("<4sIQQ")
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_DEEPEST: Final = 2  # arrays within arrays


class Malformed(Exception):
    """The bytes are not GGUF, or end too soon. The message says what is wrong, for a person."""


@dataclass(frozen=True, slots=True)
class MetadataArray:
    """An array of the metadata. kind: GGUF's type of its items. Their values are not kept."""

    kind: int
    count: int


Value = int | float | bool | str | MetadataArray


@dataclass(frozen=True, slots=True)
class Tensor:
    """shape: as ggml counts, the length of a row first. kind: ggml's type. offset: bytes from the file's `data_at`."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """data_at: the byte of the file at which the tensors' data begins. kinds: GGUF's types of the metadata's values."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_at: int
    kinds: Mapping[str, int]

    def number(self, key: str) -> int | None:
        """A whole number of the metadata; None if it is absent, or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """A text of the metadata; None if it is absent, or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def read(path: Path) -> Header:
    """The whole head of a file. Raises Malformed, or OSError."""
    with path.open("rb") as file:
        return read_from(file, path.stat().st_size)


def read_from(file: BinaryIO, size: int) -> Header:
    """As `read`. size: bytes of the whole file."""
    reader = _Reader(file, size)
    version, tensors, count = reader.counts()
    metadata, kinds = {}, {}
    for _ in range(count):
        key, kinds[key], metadata[key] = reader.typed_pair()
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise Malformed("its alignment is no whole number")
    if tensors > MAX_TENSORS:
        raise Malformed(f"it claims {tensors:,} tensors")
    found = tuple(reader.tensor() for _ in range(tensors))
    return Header(version, metadata, found, -(-file.tell() // alignment) * alignment, kinds)


def read_numbers(path: Path, wanted: frozenset[str]) -> dict[str, int]:
    """Whole numbers of the metadata by their keys; missing keys are omitted. Raises Malformed, or OSError."""
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        _, _, count = reader.counts()
        found: dict[str, int] = {}
        for _ in range(count):
            key, value = reader.pair()
            if key in wanted and isinstance(value, int) and not isinstance(value, bool):
                found[key] = value
                if len(found) == len(wanted):
                    break
        return found


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, MAX_METADATA)

    def counts(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of pairs."""
        magic, version, tensors, pairs = _HEADER.unpack(self._read(_HEADER.size))
        if magic != MAGIC:
            raise Malformed("it does not begin as a GGUF file does")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise Malformed("it is big-endian; this machine reads little-endian files")
            raise Malformed(f"it is GGUF of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are supported")
        return version, tensors, pairs

    def pair(self) -> tuple[str, Value]:
        key, _, value = self.typed_pair()
        return key, value

    def typed_pair(self) -> tuple[str, int, Value]:
        """A key, GGUF's type of its value, and the value."""
        key, kind = self._text(self._number()), self._kind()
        return key, kind, self._value(kind)

    def tensor(self) -> Tensor:
        name = self._text(self._number())
        dimensions = self._kind()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise Malformed(f"a tensor has {dimensions} dimensions")
        shape = tuple(self._number() for _ in range(dimensions))
        return Tensor(name, shape, self._kind(), self._number())

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            scalar: int | float | bool
            (scalar,) = _SCALARS[kind].unpack(self._read(_SCALARS[kind].size))
            return scalar
        if kind == _STRING:
            return self._text(self._number())
        if kind == _ARRAY:
            inner, count = self._kind(), self._number()
            self._skip(inner, count, 1)
            return MetadataArray(inner, count)
        raise Malformed(f"its metadata has a value of the unknown type {kind}")

    def _skip(self, kind: int, count: int, depth: int) -> None:
        if kind in _SCALARS:
            self._pass(_SCALARS[kind].size * count)
        elif kind == _STRING:
            for _ in range(count):
                self._pass(self._number())
        elif kind == _ARRAY and depth < _DEEPEST:
            for _ in range(count):
                self._skip(self._kind(), self._number(), depth + 1)
        else:
            raise Malformed(f"its metadata has an array of the unknown type {kind}")

    def _text(self, size: int) -> str:
        if size > MAX_TEXT:
            raise Malformed(f"a text of its metadata claims {size:,} bytes")
        return self._read(size).decode("utf-8", "replace")

    def _kind(self) -> int:
        return int.from_bytes(self._read(4), "little")

    def _number(self) -> int:
        return int.from_bytes(self._read(8), "little")

    def _read(self, size: int) -> bytes:
        self._take(size)
        data = self._file.read(size)
        if len(data) < size:
            raise Malformed("it ends within its head")
        return data

    def _pass(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Malformed("it ends within its head")
