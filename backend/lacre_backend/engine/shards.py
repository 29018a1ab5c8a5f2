"""The files of a GGUF model: one file, or the shards that `llama-gguf-split` made of it.

Rules:
- A shard is identified by its metadata (`split.no`, `split.count`), and the others by its name, as llama.cpp does:
  `NAME-00001-of-00003.gguf`. Each file's metadata must agree with its name.
- The error names a shard that is missing or belongs to another model. A part is never taken for the whole model.
- Only a file's metadata is read, at most `gguf_header.MAX_METADATA` bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine import gguf_header

MAX_SHARDS: Final = 1024  # of one model; the largest in use have about a hundred
_NAME: Final = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_WANTED: Final = frozenset({"split.no", "split.count"})


@dataclass(frozen=True, slots=True)
class Split:
    """A shard's place in a split model. number: of this shard, from 0."""

    number: int
    count: int


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order. llama.cpp loads the first.

    Raises SettingsError, which names the wrong file, or OSError if `path` cannot be read.
    """
    check_file(path)
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


def check_file(path: Path) -> None:
    """Raises SettingsError if it can be no model: nothing is there, a folder, a pipe or a device, or a name that is not UTF-8.

    Reading a pipe could wait forever, and a device may never end. llama.cpp and JSON take names in UTF-8 only.
    """
    check_name(path)
    if path.is_file():
        return
    if path.is_dir():
        raise SettingsError(f"{path} is a folder. Give the path of a model file.")
    if path.exists():
        raise SettingsError(f"{path} is a pipe or a device. Give the path of a model file.")
    raise SettingsError(f"No such model file: {path}. Check the path.")


def check_name(path: Path) -> None:
    """Raises SettingsError if it is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise SettingsError(f"The name {str(path)!r} is not UTF-8. Rename the file, or its folder.") from None


def size(path: Path) -> int:
    """Bytes of all its files. Raises as `files_of`."""
    return sum(file.stat().st_size for file in files_of(path))


def read_split(path: Path) -> Split | None:
    """The shard that the metadata describes. None for a model in one file, and for a file that is not GGUF, which llama.cpp
    then refuses.
    """
    try:
        found = gguf_header.read_numbers(path, _WANTED)
    except gguf_header.Malformed:
        return None
    count = found.get("split.count", 0)
    if count <= 1:
        return None
    number = found.get("split.no", 0)
    if count > MAX_SHARDS or not 0 <= number < count:
        raise SettingsError(
            f"{path} claims to be shard {number + 1} of {count}. Split the model again, into {MAX_SHARDS} at most."
        )
    return Split(number, count)
