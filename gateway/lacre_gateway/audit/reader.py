"""A log on disk, read: also while its gateway writes it, and also where nobody should trust it.

Rules:
- What can still change (checkpoint, partial tiles, journal) is read at once, and again until it fits together.
- Nothing is believed for where it stands: `Wrong` names the first file, and the place in it, that does not hold.
"""

from __future__ import annotations

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
KEY: Final = "key"  # the verifier key that the log itself names
_TRIES: Final = 20
_CACHED_TILES: Final = 256


class Wrong(LacreError):
    """The log does not hold. place: the file, and where in it."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{place}: {why}")
        self.place = place
        self.why = why


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What of a log can still change, as it was at one moment. note: None where nothing was published yet."""

    folder: Path
    note: bytes | None
    size: int
    files: Mapping[str, bytes | None]
    old_journal: bytes
    journal: bytes

    @property
    def commits(self) -> bytes:
        """Both journals, one after the other; some commits may be in both, or in the tiles already."""
        return self.old_journal + self.journal

    @classmethod
    def take(cls, folder: Path) -> Self:
        """Raises Wrong, or SettingsError where the folder cannot be read or is none."""
        if not folder.is_dir():
            raise SettingsError(f"{folder} is not the folder of an audit log")
        for _ in range(_TRIES):
            note = read_file(folder / CHECKPOINT, checkpoints.MAX_NOTE)
            size = _size(note)
            files = {name: read_file(folder / name, tiles.MAX_BUNDLE) for name in _partial_names(size)}
            # In this order: what is put aside in between is then seen twice, which is harmless, and never not at all.
            new, old = (read_file(folder / name, None) or b"" for name in (journal.NAME, journal.OLD))
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
            raise Wrong(name, f"it has {len(hashes)} hashes in place of {width}")
        return hashes

    def partial(self, level: int) -> list[bytes]:
        """The last tile of a level, where it is not full. Raises Wrong."""
        index, width = divmod(self.size >> tiles.HEIGHT * level, tiles.WIDTH)
        return self.tile(level, index, width) if width else []

    def bundle(self, index: int, width: int) -> list[bytes]:
        name = tiles.tile(None, index, width)
        try:
            entries = tiles.decode_bundle(self.file(name))
        except InvalidMessage as exc:
            raise Wrong(name, str(exc)) from exc
        if len(entries) != width:
            raise Wrong(name, f"it has {len(entries)} entries in place of {width}")
        return entries


def replay(
    edge: Edge, data: bytes, key: bytes, added: Callable[[], None] = lambda: None
) -> Iterator[tuple[journal.Commit, Checkpoint]]:
    """Adds the journal's commits to the published tree, and yields each once its signature and root were found to hold.

    added: called after each entry. Commits that were published already are passed over. Raises Wrong.
    """
    number = 0
    try:
        for number, commit in enumerate(journal.commits(data)):
            checkpoint = checkpoints.verify(commit.note, key)
            first = checkpoint.size - len(commit.entries)
            if checkpoint.size <= edge.size:
                continue
            if first != edge.size:
                raise Wrong(f"journal, commit {number}", f"it begins with entry {first}, and entry {edge.size} is due")
            for entry in commit.entries:
                edge.append(entry)
                added()
            if edge.root() != checkpoint.root:
                raise Wrong(f"journal, commit {number}", f"entries {first} to {edge.size - 1} are not those that were signed")
            yield commit, checkpoint
    except Wrong:
        raise
    except LacreError as exc:
        raise Wrong(f"journal, commit {number}", str(exc)) from exc


@dataclass(slots=True)
class Loaded:
    """The newest state of a log: its growing edge, and the note over it.

    whole, torn: the bytes of the journal that are whole commits, and those behind them.
    """

    edge: Edge
    note: bytes | None
    whole: int
    torn: int


def load(snapshot: Snapshot, key: bytes) -> Loaded:
    """Verifies the newest checkpoints and what is at the edge; not all that lies before. Raises Wrong."""
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
                raise Wrong(f"{name}, entry {size // tiles.WIDTH * tiles.WIDTH + number}", "it has not the hash in its tile")
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
    """Entries and proofs out of a log, up to its newest checkpoint. Full tiles are read when they are needed."""

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        """key: of the gateway; the one that the log itself names where left out. Raises Wrong or SettingsError."""
        self.key = own_key(folder) if key is None else key
        self._snapshot = Snapshot.take(folder)
        loaded = load(self._snapshot, self.key)
        if loaded.note is None:
            raise Wrong(CHECKPOINT, "it is missing")
        self._edge = loaded.edge
        self.note = loaded.note
        self.checkpoint = checkpoints.parse(self.note)
        self._tile = lru_cache(_CACHED_TILES)(lambda level, index: self._snapshot.tile(level, index, tiles.WIDTH))

    @property
    def size(self) -> int:
        return self._edge.size

    def entries(self, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """From index `begin` up to `end`. Raises Wrong."""
        stop, first = self.size if end is None else min(end, self.size), self._edge.first(None)
        for bundle in range(begin // tiles.WIDTH, first // tiles.WIDTH):
            start = bundle * tiles.WIDTH
            if start >= stop:
                return
            yield from self._snapshot.bundle(bundle, tiles.WIDTH)[max(0, begin - start) : stop - start]
        yield from self._edge.entries[max(0, begin - first) : max(0, stop - first)]

    def entry(self, index: int) -> bytes:
        """Raises SettingsError where there is none of this index, or Wrong."""
        if not 0 <= index < self.size:
            raise SettingsError(f"the log has {self.size} entries, numbered from 0")
        return next(self.entries(index, index + 1))

    def node(self, height: int, index: int) -> bytes:
        """For `lacre.evidence.merkle`."""
        level, within = divmod(height, tiles.HEIGHT)
        if within:
            return merkle.node_hash(self.node(height - 1, 2 * index), self.node(height - 1, 2 * index + 1))
        held = self._edge.hash(level, index)
        return held or self._tile(level, index // tiles.WIDTH)[index % tiles.WIDTH]

    def proof(self, index: int) -> AuditProof:
        """Under the newest checkpoint."""
        return AuditProof(self.entry(index), index, merkle.inclusion_proof(index, self.size, self.node), self.note)

    def root(self, size: int) -> bytes:
        """Of the tree of the first `size` entries."""
        return merkle.root_hash(size, self.node)


def own_key(folder: Path) -> bytes:
    """The key that the log itself names. Who rewrites a log may also rewrite this. Raises SettingsError."""
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


def read_file(path: Path, limit: int | None) -> bytes | None:
    """None where there is no such file. Raises SettingsError where it cannot be read, Wrong where it is too long."""
    try:
        with path.open("rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc
    if limit is not None and len(data) > limit:
        raise Wrong(path.name, "it is longer than such a file can be")
    return data
