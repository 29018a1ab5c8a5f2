"""Reads a log on disk, also while its gateway writes it, and even if it cannot be trusted.

Rules:
- The changing parts (checkpoint, partial tiles, journal) are read together, and again until they agree.
- Nothing is believed because of its place: `Wrong` names the first file, and the place in it, that does not hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre_gateway.audit import journal, tiles
from lacre_gateway.audit.edge import Edge

CHECKPOINT: Final = "checkpoint"
KEY: Final = "key"  # the log's own verifier key
HISTORY: Final = "checkpoints"
OPEN: Final = "open"
MAX_GROWING: Final = (
    2**30
)  # bytes of a journal or a history: tiles are written each second, and a history grows 1 byte an entry
_TRIES: Final = 20
_CACHED_TILES: Final = 256
# Each look at a log reads its journal again, which has a checkpoint for each commit.
_verify: Final = lru_cache(2048)(checkpoints.verify)


class Wrong(LacreError):
    """The log does not hold. place: the file, and where in it."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{place}: {why}")
        self.place = place
        self.why = why


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The changing parts of a log at one moment. note: None if nothing was published yet."""

    folder: Path
    note: bytes | None
    size: int
    files: Mapping[str, bytes | None]
    old_journal: bytes
    journal: bytes

    @property
    def commits(self) -> bytes:
        """Both journals, one after the other; some commits may be in both, or already in the tiles."""
        return self.old_journal + self.journal

    @classmethod
    def take(cls, folder: Path) -> Self:
        """Raises Wrong, or SettingsError if the folder cannot be read or is not a log."""
        if not folder.is_dir():
            raise SettingsError(f"{folder} is not the folder of an audit log")
        for _ in range(_TRIES):
            note = read_file(folder / CHECKPOINT, checkpoints.MAX_NOTE)
            size = _size(note)
            files = {name: read_file(folder / name, tiles.MAX_BUNDLE) for name in _partial_names(size)}
            # In this order: a commit that moves in between is then read twice, which does no harm, and never missed.
            new, old = (read_file(folder / name, MAX_GROWING) or b"" for name in (journal.NAME, journal.OLD))
            if note == read_file(folder / CHECKPOINT, checkpoints.MAX_NOTE):
                break
        return cls(folder, note, size, files, old, new)

    def file(self, name: str) -> bytes:
        """A tile or a bundle. Raises Wrong."""
        data = self.files[name] if name in self.files else read_file(self.folder / name, tiles.MAX_BUNDLE)
        if data is None:
            raise Wrong(name, "it is missing")
        return data

    def tile(self, level: int, index: int, width: int) -> list[bytes]:
        name = tiles.tile(level, index, width)
        try:
            hashes = tiles.split_tile(self.file(name))
        except InvalidMessage as exc:
            raise Wrong(name, str(exc)) from exc
        if len(hashes) != width:
            raise Wrong(name, f"it has {len(hashes)} hashes instead of {width}")
        return hashes

    def partial(self, level: int) -> list[bytes]:
        """The last tile of a level, if it is not full. Raises Wrong."""
        index, width = divmod(self.size >> tiles.HEIGHT * level, tiles.WIDTH)
        return self.tile(level, index, width) if width else []

    def bundle(self, index: int, width: int) -> list[bytes]:
        name = tiles.tile(None, index, width)
        try:
            entries = tiles.decode_bundle(self.file(name))
        except InvalidMessage as exc:
            raise Wrong(name, str(exc)) from exc
        if len(entries) != width:
            raise Wrong(name, f"it has {len(entries)} entries instead of {width}")
        return entries


def replay(
    edge: Edge, data: bytes, key: bytes, added: Callable[[], None] = lambda: None
) -> Iterator[tuple[journal.Commit, Checkpoint]]:
    """Adds the journal's commits to the published tree, and yields each after checking its signature and root.

    added: called after each entry. Skips commits that are already published. Raises Wrong.
    """
    number = 0
    try:
        for number, commit in enumerate(journal.commits(data)):
            checkpoint = _verify(commit.note, key)
            first = checkpoint.size - len(commit.entries)
            if checkpoint.size <= edge.size:
                continue
            if first != edge.size:
                raise Wrong(f"journal, commit {number}", f"it begins with entry {first} instead of entry {edge.size}")
            for entry in commit.entries:
                edge.append(entry)
                added()
            if edge.root() != checkpoint.root:
                raise Wrong(f"journal, commit {number}", f"entries {first} to {edge.size - 1} are not the signed ones")
            yield commit, checkpoint
    except Wrong:
        raise
    except LacreError as exc:
        raise Wrong(f"journal, commit {number}", str(exc)) from exc


@dataclass(slots=True)
class Loaded:
    """The newest state of a log: its growing edge, and the note over it.

    whole, torn: the bytes of the journal's whole commits, and those after them.
    """

    edge: Edge
    note: bytes | None
    whole: int
    torn: int


def load(snapshot: Snapshot, key: bytes) -> Loaded:
    """Verifies the newest checkpoints and the edge, but not everything before. Raises Wrong."""
    size = snapshot.size
    if snapshot.note is not None:
        checkpoint = _verified(snapshot.note, key)
        rows = [
            snapshot.tile(level, at // tiles.WIDTH, at % tiles.WIDTH)
            if (at := size >> tiles.HEIGHT * level) % tiles.WIDTH
            else []
            for level in tiles.levels(size)
        ]
        entries = snapshot.bundle(size // tiles.WIDTH, size % tiles.WIDTH) if size % tiles.WIDTH else []
        for number, entry in enumerate(entries):
            if merkle.leaf_hash(entry) != rows[0][number]:
                name = tiles.tile(None, size // tiles.WIDTH, size % tiles.WIDTH)
                raise Wrong(
                    f"{name}, entry {size // tiles.WIDTH * tiles.WIDTH + number}", "its hash differs from the one in its tile"
                )
        edge = Edge.restore(size, rows, entries)
        if edge.root() != checkpoint.root:
            raise Wrong(CHECKPOINT, "its root is not that of the tiles")
    else:
        edge = Edge()
    note = snapshot.note
    for commit, _ in replay(edge, snapshot.commits, key):
        note = commit.note
    whole = journal.whole(snapshot.journal)
    return Loaded(edge, note, whole, len(snapshot.journal) - whole)


class LogReader:
    """Entries and proofs from a log, up to its newest checkpoint. Full tiles are read when they are needed.

    Each entry and each hash is compared with the signed tree before anyone gets it.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        """key: the gateway's; default: the one that the log itself names. Raises Wrong or SettingsError."""
        key = own_key(folder) if key is None else key
        snapshot = Snapshot.take(folder)
        self._begin(snapshot, load(snapshot, key), key)

    @classmethod
    def of(cls, snapshot: Snapshot, loaded: Loaded, key: bytes) -> Self:
        """Of a state that was verified before. Raises Wrong if it has no checkpoint."""
        reader = cls.__new__(cls)
        reader._begin(snapshot, loaded, key)
        return reader

    def _begin(self, snapshot: Snapshot, loaded: Loaded, key: bytes) -> None:
        if loaded.note is None:
            raise Wrong(CHECKPOINT, "it is missing")
        self.key, self._snapshot, self._edge, self.note = key, snapshot, loaded.edge, loaded.note
        self.checkpoint = checkpoints.parse(self.note)
        self._sound_tile = lru_cache(_CACHED_TILES)(self._compared)

    @property
    def size(self) -> int:
        return self._edge.size

    def entries(self, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Entries from index `begin` up to `end`. Raises Wrong."""
        stop, first = self.size if end is None else min(end, self.size), self._edge.first(None)
        for bundle in range(begin // tiles.WIDTH, first // tiles.WIDTH):
            start = bundle * tiles.WIDTH
            if start >= stop:
                return
            entries = self._snapshot.bundle(bundle, tiles.WIDTH)
            if _tile_root(list(map(merkle.leaf_hash, entries))) != self._signed(1, bundle):
                raise Wrong(tiles.tile(None, bundle), "its entries are not the signed ones")
            yield from entries[max(0, begin - start) : stop - start]
        yield from self._edge.entries[max(0, begin - first) : max(0, stop - first)]

    def backwards(self) -> Iterator[bytes]:
        """All entries, the newest first. Raises Wrong."""
        yield from reversed(self._edge.entries)
        for begin in range(self._edge.first(None) - tiles.WIDTH, -1, -tiles.WIDTH):
            yield from reversed([*self.entries(begin, begin + tiles.WIDTH)])

    def entry(self, index: int) -> bytes:
        """Raises SettingsError if there is no entry of this index, or Wrong."""
        if not 0 <= index < self.size:
            raise SettingsError(f"the log has {self.size} entries, numbered from 0")
        first = self._edge.first(None)
        if index >= first:
            return self._edge.entries[index - first]
        bundle, within = divmod(index, tiles.WIDTH)
        found = self._snapshot.bundle(bundle, tiles.WIDTH)[within]
        if merkle.leaf_hash(found) != self._signed(0, index):
            raise Wrong(f"{tiles.tile(None, bundle)}, entry {index}", "it is not the signed one")
        return found

    @property
    def last(self) -> bytes:
        """The newest entry. Raises SettingsError if there is none, or Wrong."""
        return self.entry(self.size - 1)

    def _signed(self, level: int, index: int) -> bytes:
        """The hash at a place of a tile level, as the signed tree has it. Raises Wrong."""
        return self._edge.hash(level, index) or self._sound_tile(level, index // tiles.WIDTH)[index % tiles.WIDTH]

    def _compared(self, level: int, index: int) -> list[bytes]:
        hashes = self._snapshot.tile(level, index, tiles.WIDTH)
        if _tile_root(hashes) != self._signed(level + 1, index):
            raise Wrong(tiles.tile(level, index), "its hashes are not the signed ones")
        return hashes

    def node(self, height: int, index: int) -> bytes:
        """For `lacre.evidence.merkle`. Raises Wrong."""
        level, within = divmod(height, tiles.HEIGHT)
        if within:
            return merkle.node_hash(self.node(height - 1, 2 * index), self.node(height - 1, 2 * index + 1))
        return self._signed(level, index)

    def proof(self, index: int) -> AuditProof:
        """Under the newest checkpoint. Raises SettingsError if there is no entry of this index, or Wrong."""
        return AuditProof(self.entry(index), index, merkle.inclusion_proof(index, self.size, self.node), self.note)


def _tile_root(hashes: list[bytes]) -> bytes:
    """The one hash over a full tile."""
    while len(hashes) > 1:
        hashes = list(map(merkle.node_hash, hashes[::2], hashes[1::2]))
    return hashes[0]


def own_key(folder: Path) -> bytes:
    """The key that the log itself names. Someone who rewrites a log may also rewrite this. Raises SettingsError."""
    text = read_file(folder / KEY, 4096)
    if text is None:
        raise SettingsError(f"{folder} is not the folder of an audit log: it has no file {KEY!r}")
    try:
        return checkpoints.parse_verifier_key(text.decode())[1]
    except (InvalidMessage, UnicodeDecodeError) as exc:
        raise SettingsError(f"{folder / KEY} is damaged: pass the gateway's key with --key") from exc


def _verified(note: bytes, key: bytes) -> Checkpoint:
    try:
        return checkpoints.verify(note, key)
    except LacreError as exc:
        raise Wrong(CHECKPOINT, str(exc)) from exc


def _size(note: bytes | None) -> int:
    try:
        return 0 if note is None else checkpoints.parse(note).size
    except LacreError as exc:
        raise Wrong(CHECKPOINT, str(exc)) from exc


def _partial_names(size: int) -> Iterator[str]:
    for level in tiles.levels(size):
        at = size >> tiles.HEIGHT * level
        if at % tiles.WIDTH:
            yield tiles.tile(level, at // tiles.WIDTH, at % tiles.WIDTH)
    if size % tiles.WIDTH:
        yield tiles.tile(None, size // tiles.WIDTH, size % tiles.WIDTH)


def read_file(path: Path, limit: int) -> bytes | None:
    """None if there is no such file. Raises SettingsError if it cannot be read, Wrong if it is no file or too long."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            fits = stat.S_ISREG(status.st_mode) and status.st_size <= limit
            data = file.read(status.st_size) if fits else b""
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc
    if not fits:
        regular = stat.S_ISREG(status.st_mode)
        raise Wrong(path.name, "it is longer than such a file can be" if regular else "it is not a file")
    return data


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)
