"""Partial tiles that wider ones have replaced, and tiles that no checkpoint covers yet: `verify` checks them too.

Rules:
- A crash between two steps may leave such files. A commit is in the journal before any tile has it, and a tile appears whole.
  So those of a crash agree with the log. Any that does not agree was altered, and other readers may have taken it for the log.
- Files whose names begin with a dot are unfinished, and are not checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage, SettingsError
from lacre_gateway.audit import tiles
from lacre_gateway.audit.edge import Edge
from lacre_gateway.audit.reader import Snapshot, Wrong, read_file

_NAME: Final = re.compile(r"tile/(?P<level>[0-9]|entries)/(?P<index>(x[0-9]{3}/)*[0-9]{3})(\.p/(?P<width>[1-9][0-9]{0,2}))?")
_PAST: Final = "it is past the end of the log: the log was cut, or copied while the gateway wrote it. Then copy it again"


def named(folder: Path) -> Mapping[str, tuple[int | None, int, int]]:
    """Every file below `tile`: its level, its index and its width. Raises Wrong if one belongs to no log."""
    found = {}
    for name in sorted(_files(folder)):
        match = _NAME.fullmatch(name)
        if match is None or int(match["width"] or 1) >= tiles.WIDTH:
            raise Wrong(ascii(name)[1:-1], "no such file belongs to a log")  # anyone may have chosen the name
        level = None if match["level"] == "entries" else int(match["level"])
        index = int(match["index"].replace("x", "").replace("/", ""))
        found[name] = level, index, int(match["width"] or tiles.WIDTH)
    return found


def _files(folder: Path) -> Iterator[str]:
    """The names below the log's folder. What is a folder, the listing says: the gateway may have removed it a moment later.

    Raises SettingsError.
    """

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise SettingsError(f"cannot read {error.filename}: {error.strerror}") from error

    for at, _folders, names in os.walk(folder / "tile", onerror=failed):
        for name in names:
            if not name.startswith("."):  # unfinished files are `.NAME.new`
                yield Path(at, name).relative_to(folder).as_posix()


def check(files: Mapping[str, tuple[int | None, int, int]], edge: Edge, snapshot: Snapshot) -> None:
    """Compares those that the newest checkpoint does not use with the log, which was verified before. Raises Wrong."""
    for name, (level, index, width) in files.items():
        height = tiles.HEIGHT * (level or 0)
        if name in snapshot.files or (width == tiles.WIDTH and (index + 1) * tiles.WIDTH <= snapshot.size >> height):
            continue  # the newest checkpoint uses it
        data = read_file(snapshot.folder / name, tiles.MAX_BUNDLE)
        if data is None:
            continue  # the gateway has removed it meanwhile
        try:
            found = tiles.decode_bundle(data) if level is None else tiles.split_tile(data)
        except InvalidMessage as exc:
            raise Wrong(name, str(exc)) from exc
        due = _due(edge, snapshot, level, index, width)
        if due is None:
            raise Wrong(name, _PAST)
        if found != due:
            raise Wrong(name, "it does not agree with the log, which has a wider one")


def _due(edge: Edge, snapshot: Snapshot, level: int | None, index: int, width: int) -> Sequence[bytes] | None:
    """What the file must hold; None if the log is not so long."""
    begin, end = index * tiles.WIDTH, index * tiles.WIDTH + width
    if end > edge.size >> tiles.HEIGHT * (level or 0):
        return None
    first = edge.first(level)
    if begin >= first:
        return (edge.entries if level is None else edge.rows[level])[begin - first : end - first]
    full = snapshot.bundle(index, tiles.WIDTH) if level is None else snapshot.tile(level, index, tiles.WIDTH)
    return full[:width]
