"""The names and bytes of tiles and entry bundles: C2SP tlog-tiles, in a folder instead of behind a URL.

Rules:
- A full tile or bundle never changes. A partial one is named by its width, so it never changes either.
- Files are 0600 and appear whole: written beside, synced, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage
from lacre.evidence.merkle import HASH_BYTES
from lacre.runtime.private_files import sync_folder

WIDTH: Final = 256
HEIGHT: Final = 8
MAX_BUNDLE: Final = WIDTH * (2 + 0xFFFF)
_LENGTH_BYTES: Final = 2
# To write a file. Someone who writes to the log's disk must not make the gateway write elsewhere, through a link.
FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def levels(size: int) -> range:
    """The tile levels that a tree of this size has."""
    return range(max(1, -(-size.bit_length() // HEIGHT))) if size else range(0)


def tile(level: int | None, index: int, width: int = WIDTH) -> str:
    """The name of a tile, below the log's folder. level: None for an entry bundle."""
    name = f"{index % 1000:03d}"
    while index := index // 1000:
        name = f"x{index % 1000:03d}/{name}"
    return f"tile/{'entries' if level is None else level}/{name}{'' if width == WIDTH else f'.p/{width}'}"


def encode_bundle(entries: Iterable[bytes]) -> bytes:
    return b"".join([len(entry).to_bytes(_LENGTH_BYTES) + entry for entry in entries])


def decode_bundle(data: bytes) -> list[bytes]:
    """Raises InvalidMessage."""
    entries, at = [], 0
    while at < len(data):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(data[at:begin])
        entries.append(data[begin:at])
    if at != len(data):
        raise InvalidMessage("the entries do not fill the bundle")
    return entries


def split_tile(data: bytes) -> list[bytes]:
    """Raises InvalidMessage."""
    if len(data) % HASH_BYTES:
        raise InvalidMessage("a tile must be a row of hashes of 32 bytes")
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def write_files(folder: Path, files: Sequence[tuple[str, bytes]]) -> None:
    """Writes and syncs the files and their folders. Raises OSError; then none, some or all are there."""
    parents: set[Path] = set()
    for name, content in files:
        path = folder / name
        make_folders(path.parent, folder)
        _replace(path, content)
        parents.update(parent for parent in path.parents if parent == folder or folder in parent.parents)
    for parent in parents:
        sync_folder(parent)


def make_folders(path: Path, top: Path) -> None:
    """Each with mode 0700; `Path.mkdir(parents=True)` would create the parents with another mode."""
    if path != top and not path.is_dir():
        make_folders(path.parent, top)
        path.mkdir(mode=0o700, exist_ok=True)


def write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")  # only one writer, so one name; it overwrites the remains of a crash
    handle = os.open(beside, FLAGS | os.O_TRUNC, 0o600)
    try:
        write_all(handle, content)
        os.fsync(handle)
    except OSError:
        beside.unlink(missing_ok=True)  # on a full disk, the unfinished file takes space from everything else
        raise
    finally:
        os.close(handle)
    beside.replace(path)
