"""The files of a GGUF model: one file, or the shards that `llama-gguf-split` made of it.

Rules:
- A shard is identified by its metadata (`split.no`, `split.count`), and the others by its name, as llama.cpp does:
  `NAME-00001-of-00003.gguf`. Each file's metadata must agree with its name.
- The error names a shard that is missing or belongs to another model. A part is never taken for the whole model.
- Only a file's metadata is read, at most `MAX_METADATA` bytes. A length is checked before its data is read.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from lacre.errors import SettingsError

MAX_SHARDS: Final = 1024  # of one model; the largest in use have about a hundred
MAX_METADATA: Final = 256 * 2**20  # bytes; vocabularies of 260,000 tokens with their merges take about 10 MiB
_HEADER: Final = struct.Struct("<4sIQQ")
_NAME: Final = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_WIDTHS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type
_WHOLE: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9
_WANTED: Final = frozenset({b"split.no", b"split.count"})


@dataclass(frozen=True, slots=True)
class Split:
    """A shard's place in a split model. number: of this shard, from 0."""

    number: int
    count: int


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order. llama.cpp loads the first.

    Raises SettingsError, which names the wrong file, or OSError if `path` cannot be read.
    """
    split = read_split(path)
    if split is None:
        return (path,)
    found = _NAME.fullmatch(path.name)
    if found is None or (int(found[2]), int(found[3])) != (split.number + 1, split.count):
        wanted = f"-{split.number + 1:05d}-of-{split.count:05d}.gguf"
        raise SettingsError(
            f"{path} is shard {split.number + 1} of a model of {split.count} files, which must be named in order. "
            f"Rename it to end with {wanted}, and put the others beside it."
        )
    files = tuple(path.with_name(f"{found[1]}-{i + 1:05d}-of-{split.count:05d}.gguf") for i in range(split.count))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SettingsError(
            f"The model {path} is split into {split.count} files; missing: {', '.join(missing[:3])}"
            f"{' (and more)' if len(missing) > 3 else ''}. Put it beside the others."
        )
    for number, file in enumerate(files):
        if read_split(file) != Split(number, split.count):
            raise SettingsError(
                f"{file} is not shard {number + 1} of {split.count}, as its name says. Put this model's own file there."
            )
    return files


def size(path: Path) -> int:
    """Bytes of all its files. Raises as `files_of`."""
    return sum(file.stat().st_size for file in files_of(path))


def read_split(path: Path) -> Split | None:
    """The shard that the metadata describes. None for a model in one file, and for a file that is not GGUF, which llama.cpp
    then refuses.
    """
    with path.open("rb") as file:
        try:
            found = _Metadata(file, path.stat().st_size).find(_WANTED)
        except _Unreadable:
            return None
    count = found.get(b"split.count", 0)
    if count <= 1:
        return None
    number = found.get(b"split.no", 0)
    if count > MAX_SHARDS or not 0 <= number < count:
        raise SettingsError(
            f"{path} claims to be shard {number + 1} of {count}. Split the model again, into {MAX_SHARDS} at most."
        )
    return Split(number, count)


class _Unreadable(Exception):
    """The bytes are not GGUF, or end too soon."""


class _Metadata:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, MAX_METADATA)

    def find(self, wanted: frozenset[bytes]) -> dict[bytes, int]:
        """Integers by their keys; missing keys are omitted."""
        magic, version, _, count = _HEADER.unpack(self._read(_HEADER.size))
        if magic != b"GGUF" or version not in (2, 3):
            raise _Unreadable
        found: dict[bytes, int] = {}
        for _ in range(count):
            key, kind = self._read(self._number()), self._kind()
            if key in wanted and kind in _WHOLE:
                (found[key],) = struct.unpack(_WHOLE[kind], self._read(_WIDTHS[kind]))
                if len(found) == len(wanted):
                    break
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int, depth: int = 0) -> None:
        if kind in _WIDTHS:
            self._pass(_WIDTHS[kind])
        elif kind == _STRING:
            self._pass(self._number())
        elif kind == _ARRAY and depth < 2:
            inner, count = self._kind(), self._number()
            if inner in _WIDTHS:
                self._pass(_WIDTHS[inner] * count)
            else:
                for _ in range(count):
                    self._skip(inner, depth + 1)
        else:
            raise _Unreadable

    def _kind(self) -> int:
        return int.from_bytes(self._read(4), "little")

    def _number(self) -> int:
        return int.from_bytes(self._read(8), "little")

    def _read(self, size: int) -> bytes:
        self._take(size)
        data = self._file.read(size)
        if len(data) < size:
            raise _Unreadable
        return data

    def _pass(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _Unreadable
