"""An audit log on disk, for its only writer: recovery, group commits, and the publication of tiles.

    key                     the verifier key, for tools
    checkpoint, tile/…      C2SP tlog-tiles, as of the last publication
    journal, journal.old    the commits since
    checkpoints             one published checkpoint for each 256 entries or more, the oldest first
    open                    ids of requests without an outcome at some size of the log; saves reading it from the start
    lock                    held by the process that writes
    reserve                 room for the day the disk is full (`reserve.py`)
    log-2, log-3, …         the logs that continue this one (`series.py`); the last one is written

Rules:
- A commit is in the journal, synced and signed, before any caller learns of it. Publication moves the journal's commits into
  tiles. It starts a new journal only after the tiles and their checkpoint are synced.
- A log has one origin and one key forever, and one writer at a time. A log that does not hold is never written to.
- Files are 0600 and folders 0700.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import filelock
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import b64u, raw_public_key
from lacre.runtime import file_locks
from lacre.runtime.json_objects import parse_object
from lacre_fabric.native.ed25519 import Signer
from lacre_gateway.audit import chain, journal, open_requests, series, tiles
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.entries import Event, LogLink, encode, parse
from lacre_gateway.audit.journal import Journal
from lacre_gateway.audit.reader import (
    CHECKPOINT,
    HISTORY,
    KEY,
    MAX_GROWING,
    OPEN,
    Loaded,
    LogReader,
    Snapshot,
    Wrong,
    load,
    own_key,
    read_file,
)
from lacre_gateway.audit.story import next_key

LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class Committed:
    """A group commit. first: the index of its first entry. nodes: of the tree, enough for its entries' proofs."""

    entries: Sequence[bytes]
    first: int
    note: bytes
    nodes: dict[tuple[int, int], bytes]

    def proof(self, number: int) -> AuditProof:
        """The proof of the commit's entry of this number."""
        index, size = self.first + number, self.first + len(self.entries)
        path = merkle.inclusion_proof(index, size, lambda height, place: self.nodes[height, place])
        return AuditProof(self.entries[number], index, path, self.note)


@dataclass(frozen=True, slots=True)
class Publication:
    """The tiles to be written, and the checkpoint over them. noted: whether the history gets the checkpoint too."""

    folder: Path
    size: int
    files: tuple[tuple[str, bytes], ...]
    state: bytes
    note: bytes
    noted: bool

    def write(self) -> Publication:
        """In any thread. Raises OSError; then it can be made and written again."""
        tiles.write_files(self.folder, self.files)
        tiles.write_files(self.folder, [(OPEN, self.state), (CHECKPOINT, self.note)])
        if self.noted:
            _append(self.folder / HISTORY, self.note)
        return self


class Store:
    """Not thread-safe. Methods raise OSError; even then the log on disk holds, and commits stay."""

    def __init__(self, folder: Path, key: Ed25519PrivateKey, origin: str, others: Sequence[Ed25519PrivateKey] = ()) -> None:
        """Opens or creates the log; `origin` is for a new one. others: may be the key of the log that is there. Raises
        SettingsError.
        """
        self._root = folder
        self._key = key
        self._keys = {raw_public_key(each): each for each in (key, *others)}
        try:
            self._lock = _locked(folder)
        except OSError as exc:
            raise SettingsError(f"audit: cannot write in {folder} ({exc.strerror}): name a folder that this user owns") from exc
        try:
            self._open(origin)
        except OSError as exc:
            self._lock.release()
            raise SettingsError(f"audit: cannot write in {folder} ({exc.strerror})") from exc
        except BaseException:
            self._lock.release()
            raise

    def _open(self, origin: str, before: bytes | None = None) -> None:
        """Takes the newest log; on an error, this object is as before. before: the note that it must link, if it is known.

        Raises OSError or SettingsError.
        """
        number = series.newest(self._root)
        folder = series.place(self._root, number)
        key = self._keys.get(own_key(folder), self._key) if (folder / KEY).exists() else self._key
        snapshot = Snapshot.take(folder)
        loaded, last = self._load(snapshot, raw_public_key(key), number, before)
        if number > 1 and not loaded.note:  # a rotation makes a log with its first entry by one rename
            raise SettingsError(f"audit: {folder} is no log, and the log before it does not continue there: remove it")
        named = None if last is None else next_key(last)
        following = key if named is None else self._keys.get(named)
        if following is None:
            raise SettingsError(f"audit: signing_key lacks the key with which the log in {folder} continues: restore it there")
        self._key, self.public, self._next = key, raw_public_key(key), following
        self._signer = Signer(key)
        if loaded.note:
            origin = checkpoints.parse(loaded.note).origin
        else:
            verifier = checkpoints.verifier_key(origin, self.public) + "\n"
            tiles.write_files(folder, [(KEY, verifier.encode())])
        noted = _last_noted(folder / HISTORY, self.public, loaded.edge.size)
        self._journal = Journal(folder, loaded.whole)
        self._number, self._folder, self.origin, self._noted, self.ended = number, folder, origin, noted, last is not None
        self._edge, self._note, self.torn = loaded.edge, loaded.note or b"", loaded.torn
        self._published = snapshot.size
        self._identity = checkpoints.key_id(origin, self.public)
        self._partials = set(snapshot.files)

    def _load(
        self, snapshot: Snapshot, public: bytes, number: int, before: bytes | None
    ) -> tuple[Loaded, Mapping[str, Any] | None]:
        """The state of a log, and its last entry if another log continues it."""
        folder = snapshot.folder
        try:
            loaded = load(snapshot, public)
            if loaded.note is None:
                if (folder / "tile").exists() and not snapshot.commits:
                    raise Wrong(CHECKPOINT, "it is missing")
                return loaded, None
            reader = LogReader.of(snapshot, loaded, public)
            if number > 1:
                _check_link(reader, number, before)
            return loaded, _end(reader)
        except Wrong as exc:
            raise SettingsError(
                f"audit: the log in {folder} does not hold, or has another key ({exc}): keep it for the auditor, "
                "and name a new folder"
            ) from exc

    @property
    def size(self) -> int:
        return self._edge.size

    @property
    def unpublished(self) -> int:
        """Entries that are in the journal and in no tile yet."""
        return self._edge.size - self._published

    def commit(self, entries: Sequence[bytes]) -> Committed:
        """Durable and signed on return. Raises OSError; then none of the entries is in the log."""
        mark, first = self._edge.mark(), self._edge.size
        nodes = {(height, index): node for height, index, node in self._edge.nodes()}
        for entry in entries:
            for height, index, node in self._edge.append(entry):
                nodes[height, index] = node
        note = Checkpoint(self.origin, self._edge.size, self._edge.root()).sign(self._signer, self._identity)
        try:
            self._journal.append(entries, note)
        except OSError:
            self._edge.reset(mark)
            raise
        self._note = note
        return Committed(entries, first, note, nodes)

    def publication(self, without_outcome: Collection[str]) -> Publication:
        """The files to be written for the log as it is now; needs at least one commit. One at a time. Raises OSError.

        without_outcome: the requests that have none yet.
        """
        self._journal.begin_anew()
        size = self._edge.size
        state = open_requests.listed(self._key, self.origin, size, without_outcome)
        noted = size // tiles.WIDTH > self._noted // tiles.WIDTH
        return Publication(self._folder, size, tuple(self._tiles()), state, self._note, noted)

    def published(self, done: Publication) -> None:
        """Drops the parts that are on disk now. Raises OSError."""
        self._journal.drop_old()
        self._edge.drop_full(done.size)
        self._published = done.size
        if done.noted:
            self._noted = done.size
        partials = {name for name, _ in done.files if ".p/" in name}
        self._remove(self._partials - partials)
        self._partials = partials

    def still_open(self) -> tuple[int, list[str]] | None:
        """A size of the log, and the requests without an outcome at that size. None if there is no list that can be trusted."""
        try:
            data = read_file(self._folder / OPEN, MAX_GROWING)
        except LacreError:
            return None
        listed = None if data is None else open_requests.read(data, self.public, self.origin)
        return listed if listed is not None and 0 <= listed[0] <= self.size else None

    @property
    def folder(self) -> Path:
        """Of the log that is written now."""
        return self._folder

    def rotate(
        self, now: float, still_open: Collection[str], actor: str | None = None, key: Ed25519PrivateKey | None = None
    ) -> None:
        """Ends this log, and begins the one that continues it. Nothing may be under way in other threads.

        still_open: the requests without an outcome. key: signs the next log; default: this one's. Raises OSError; then `ended`
        says whether this log takes entries, and the call can be repeated.
        """
        number = self._number + 1
        following = series.following(self.origin, self._number)
        if not self.ended:
            if series.newest(self._root) > self._number:  # the gateway would take it for its own next log
                raise FileExistsError(errno.EEXIST, f"{series.name(series.newest(self._root))} is in the way: remove it")
            self._next, named = self._key, None
            if key is not None and raw_public_key(key) != self.public:
                self._next, named = key, b64u(raw_public_key(key))
                self._keys[raw_public_key(key)] = key
            self.commit(encode(Event(time=now, event=kinds.ROTATED, actor=actor, target=following, reason=named)))
            self.ended = True
        self.published(self.publication(still_open).write())
        if series.newest(self._root) == self._number:
            link = LogLink(time=now, checkpoint=self._note.decode(), open=len(still_open))
            state = open_requests.listed(self._next, following, 1, still_open)
            series.begin(series.place(self._root, number), following, self._next, link, state)
        old, folder = self._journal, self._folder
        try:
            self._open(following, self._note)
        except SettingsError as exc:  # someone put another folder there after this log had ended
            raise FileExistsError(errno.EEXIST, f"{series.name(number)} is in the way: remove it ({exc})") from exc
        old.close()
        for name in (journal.NAME, journal.OLD, OPEN):  # the tiles hold it all
            (folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        self._journal.close()
        self._lock.release()

    def _tiles(self) -> Iterator[tuple[str, bytes]]:
        """Every full tile and bundle that is not on disk yet, and the partial ones."""
        edge = self._edge
        for level, row in enumerate(edge.rows):
            for index, hashes in _cut(edge.first(level), row):
                yield tiles.tile(level, index, len(hashes)), b"".join(hashes)
        for index, entries in _cut(edge.first(None), edge.entries):
            yield tiles.tile(None, index, len(entries)), tiles.encode_bundle(entries)

    def _remove(self, names: Collection[str]) -> None:
        """Removes partial tiles of older checkpoints that wider ones replace."""
        for name in names:
            path = self._folder / name
            path.unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _cut(first: int, row: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    """A row as tiles, each with its index; the last one may be partial."""
    for at in range(0, len(row), tiles.WIDTH):
        yield (first + at) // tiles.WIDTH, row[at : at + tiles.WIDTH]


def _end(reader: LogReader) -> Mapping[str, Any] | None:
    """The last entry, if it says that another log continues this one. Raises Wrong."""
    try:
        members = parse_object(reader.last, "it")
        return members if members.get("event") == kinds.ROTATED else None
    except InvalidMessage as exc:
        raise Wrong(f"entry {reader.size - 1}", str(exc)) from exc


def _check_link(reader: LogReader, number: int, before: bytes | None) -> None:
    """Raises Wrong unless the log begins with a link to the log before. before: that one's last checkpoint, if it is known."""
    try:
        link = parse(reader.entry(0))
        note = str(link["checkpoint"]).encode() if link["kind"] == LogLink.kind else b""
        due = series.following(checkpoints.parse(note).origin, number - 1)
    except LacreError as exc:
        raise Wrong("entry 0", chain.NO_LINK) from exc
    if before is not None and note != before:
        raise Wrong("entry 0", chain.NO_LINK)
    if reader.checkpoint.origin != due:
        raise Wrong(CHECKPOINT, f"its origin is {reader.checkpoint.origin}, and {due} continues the log before")


def _locked(folder: Path) -> filelock.BaseFileLock:
    """Raises OSError, or SettingsError if another process has the lock."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"audit: {folder} is a file: name a folder for the audit log")
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return file_locks.take(folder / LOCK, f"audit: another gateway writes in {folder}: each process needs a folder of its own")


def _last_noted(path: Path, public: bytes, size: int) -> int:
    """The size in the last whole note of the history; cuts off the damage of a crash after it. Raises OSError."""
    notes, whole = notes_in(read_file(path, MAX_GROWING) or b"")
    if path.exists() and whole < path.stat().st_size:
        handle = os.open(path, tiles.FLAGS)
        try:
            os.ftruncate(handle, whole)
        finally:
            os.close(handle)
    try:
        noted = checkpoints.verify(notes[-1], public).size if notes else 0
    except LacreError:
        return 0  # it does not hold; `lacre audit verify` reports that
    return noted if noted <= size else 0


def notes_in(data: bytes) -> tuple[list[bytes], int]:
    """The notes of a history, five lines each, and the end of the last whole one."""
    lines = data.splitlines(keepends=True)
    notes = [b"".join(lines[at : at + 5]) for at in range(0, len(lines) - 4, 5)]
    if notes and not notes[-1].endswith(b"\n"):
        notes.pop()
    return notes, sum(map(len, notes))


def _append(path: Path, note: bytes) -> None:
    handle = os.open(path, tiles.FLAGS | os.O_APPEND, 0o600)
    try:
        size = os.fstat(handle).st_size
        try:
            tiles.write_all(handle, note)
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
