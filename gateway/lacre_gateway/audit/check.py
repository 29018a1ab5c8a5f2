"""Whether a log holds: checks every byte from the first entry to the newest checkpoint, and names the first fault.

Rules:
- Everything is computed again from the entries, and compared with the files in the order of the log.
- A log proves only that it agrees with itself. A kept checkpoint proves that nothing before it was changed, cut or forked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage, InvalidProof, LacreError
from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre_gateway.audit import chain, journal, leftovers, series, tiles
from lacre_gateway.audit.edge import Edge
from lacre_gateway.audit.reader import (
    CHECKPOINT,
    HISTORY,
    KEY,
    MAX_GROWING,
    LogReader,
    Snapshot,
    Wrong,
    own_key,
    read_file,
    replay,
)
from lacre_gateway.audit.store import notes_in
from lacre_gateway.audit.story import Story

SELF_CONSISTENT: Final = "self-consistent only"
_KEPT: Final = "the checkpoint kept elsewhere"


@dataclass(slots=True)
class AuditResult:
    """The result. origin, size, root: of the newest log, or of the first one that does not hold. requests: in all logs that
    were read. under_way: intents without an outcome since the last start; they may still get one.

    anchored: the size of the largest kept checkpoint that agrees, of the newest log that has one; anchor: that log's origin.
    None without one. logs: how many there are; erased: how many of them retention erased. uncompared: kept checkpoints that are
    of erased logs, at sizes for which no checkpoint remains. torn: bytes of an unfinished commit at the end of the journal; no
    answer depended on it. continues: the origin of the log before the first one, if that is a log which is not here.
    """

    origin: str
    size: int
    root: bytes
    requests: int
    under_way: int
    torn: int
    anchored: int | None
    anchor: str | None = None
    logs: int = 1
    erased: int = 0
    uncompared: int = 0
    continues: str | None = None
    wrong: Wrong | None = None

    @property
    def words(self) -> str:
        if self.wrong is not None:
            return f"does not hold: {self.wrong}"
        rest = "" if self.continues is None else f"; it continues the log {self.continues}, which is not here"
        if self.anchored is None:
            return SELF_CONSISTENT + rest
        which = "" if self.anchor == self.origin else f" of {self.anchor}"
        return f"holds, and extends the kept checkpoint of {self.anchored} entries{which}{rest}"


def verify(folder: Path, key: bytes | None = None, kept: Sequence[bytes] = ()) -> AuditResult:
    """Verifies a log and those that continue it.

    key: the gateway's, if it is known apart from the log; if it was replaced, any of its keys. kept: checkpoints (signed notes)
    that were kept outside it. Raises SettingsError if the folder is not a log or cannot be read.
    """
    own_key(folder)  # or it is no log
    chain = _Chain(folder, key)
    try:
        chain.run(kept)
    except Wrong as exc:
        chain.result.wrong = exc
    return chain.result


def check_receipt(proof: AuditProof, reader: LogReader) -> None:
    """Checks that the log keeps its promise: the proof holds, and the log extends the proven tree.

    Raises InvalidAudit if the proof itself does not hold, and Wrong if the log has broken its promise.
    """
    promised = proof.verify(reader.key)
    if promised.origin != reader.checkpoint.origin:
        raise Wrong(CHECKPOINT, f"it is of {reader.checkpoint.origin}, and the proof is of {promised.origin}")
    if promised.size > reader.size:
        raise Wrong(f"entry {reader.size}", f"the log was rolled back: it had {promised.size} entries, and has {reader.size}")
    if reader.entry(proof.index) != proof.entry:
        raise Wrong(f"entry {proof.index}", "it is not the entry that was proved to the client")
    path = merkle.consistency_proof(promised.size, reader.size, reader.node)
    try:
        merkle.verify_consistency(promised.size, promised.root, reader.size, reader.checkpoint.root, path)
    except InvalidProof as exc:
        raise Wrong(f"entries 0 to {promised.size - 1}", "the proof's checkpoint was signed over other entries") from exc


class _Chain:
    """All logs of a folder, the oldest first."""

    def __init__(self, root: Path, known: bytes | None) -> None:
        self._root, self._known = root, known
        self._key = b""  # of the log that is verified now
        self._story = Story()
        self._erased: Checkpoint | None = None  # the last checkpoint of the newest erased log
        self._unvouched: int | None = None  # the log whose new key only a later log of the known key can vouch for
        self._last: Checkpoint | None = None
        self.result = AuditResult("", 0, merkle.EMPTY_ROOT, 0, 0, 0, None)

    def run(self, kept: Sequence[bytes]) -> None:
        """Raises Wrong."""
        anchors = [self._kept(note) for note in kept]
        number, note, more = 0, None, True
        while more:
            number += 1
            self.result.logs = number
            more = series.newest(self._root) > number  # first: the gateway may rotate the log while it is read below
            with series.named(number):
                note = self._log(number, note, anchors)
            if self._story.ended is not None and not more:
                more = series.appears(self._root, number + 1)
                if not more:
                    raise Wrong(series.name(number + 1), series.MISSING)
        if self._erased is not None and self._story.erased.get(self._erased.origin) != self._erased.size:
            raise Wrong(self._erased.origin, series.UNRECORDED)
        if self._unvouched is not None:
            with series.named(self._unvouched):
                raise Wrong(KEY, series.NOT_NAMED)
        if anchors:
            raise Wrong(_KEPT, f"its origin is {anchors[0].origin}, and the log's is {self.result.origin}")

    def _kept(self, note: bytes) -> Checkpoint:
        """Of any of the logs."""
        fault: Wrong | None = None
        for number in range(1, series.newest(self._root) + 1):
            if not (series.place(self._root, number) / KEY).exists():
                continue
            try:
                return _verified(note, series.key_of(self._root, number, self._known), _KEPT)
            except Wrong as exc:
                fault = fault or exc
        raise fault or Wrong(_KEPT, "there is no log")

    def _turn_to(self, number: int) -> None:
        """Takes the key of this log, which the log before must have named if it is another one."""
        key, before = series.key_of(self._root, number, self._known), self._key
        if number > 1 and key != before:
            if self.result.erased < number - 1:
                if self._story.next_key != key:
                    raise Wrong(KEY, series.NOT_NAMED)
            elif self._unvouched is None:  # the last entry of the log before, which would name the key, is gone
                self._unvouched = number
        self._key = key

    def _log(self, number: int, before: bytes | None, anchors: list[Checkpoint]) -> bytes:
        """Verifies one log, and returns its last checkpoint. Takes its anchors from the list."""
        folder = series.place(self._root, number)
        if not (folder / KEY).exists():
            raise Wrong(KEY, "the log is missing")
        due = None if self._last is None else series.following(self._last.origin, number - 1)
        if due is not None and self._story.ended != due:
            raise Wrong("its first entry", f"the log before does not end with the event that {due} continues it")
        self._turn_to(number)
        state = deepcopy((self._story, anchors))
        first = series.erased(folder)
        try:
            note = self._walked(folder, before, anchors) if first is None else self._past(folder, before, anchors)
        except Wrong:
            if first is not None or series.erased(folder) is None:
                raise
            self._story, anchors[:] = state  # retention erased the log while it was read here
            note = self._past(folder, before, anchors)
        if due is not None and self._last is not None and self._last.origin != due:
            raise Wrong(CHECKPOINT, f"its origin is {self._last.origin}, and {due} continues the log before")
        if number == 1:
            self.result.continues = self._story.continues
        if self._key == self._known or self._known is None:
            self._unvouched = None  # it is signed by that key, and its links vouch for the logs before it
        return note

    def _walked(self, folder: Path, before: bytes | None, anchors: list[Checkpoint]) -> bytes:
        result = self.result
        self._story.begin(before, complete=result.erased < result.logs - 1)
        walk = _Walk(folder, self._key, self._story)
        try:
            walk.run(anchors)
        finally:
            result.origin, result.size, result.root, result.torn = walk.origin, walk.edge.size, walk.edge.root(), walk.torn
            result.requests, result.under_way = self._story.requests, self._story.under_way
        self._last = Checkpoint(walk.origin, walk.edge.size, walk.edge.root())
        self._anchored(walk.anchored)
        return walk.note

    def _anchored(self, size: int | None) -> None:
        if size is not None and self._last is not None:
            self.result.anchored, self.result.anchor = size, self._last.origin

    def _past(self, folder: Path, before: bytes | None, anchors: list[Checkpoint]) -> bytes:
        """What remains of an erased log: its checkpoints, and the proof of its first entry."""
        result = self.result
        if result.erased < result.logs - 1 and not (series.place(self._root, result.logs - 1) / series.PROOF).exists():
            raise Wrong(series.PROOF, chain.OUT_OF_TURN)
        first = series.remains(folder, self._key)
        if first is None:
            raise Wrong(series.PROOF, "it is missing")
        note = first.checkpoint
        last = checkpoints.parse(note)
        try:
            self._story.begin(before, complete=False)
            self._story.follow(0, first.entry)
        except LacreError as exc:
            raise Wrong(series.PROOF, str(exc)) from exc
        remaining = {last.size: last.root}
        for number, old in enumerate(notes_in(read_file(folder / HISTORY, MAX_GROWING) or b"")[0]):
            checkpoint = _of_log(_verified(old, self._key, what := f"{HISTORY}, note {number},"), last.origin, what)
            remaining.setdefault(checkpoint.size, checkpoint.root)
        self._last = self._erased = last
        result.erased, result.origin, result.size, result.root = result.logs, last.origin, last.size, last.root
        for anchor in _taken(anchors, last.origin):
            self._anchored(self._compared(anchor, last, remaining))
        self._story.ended = series.following(last.origin, self.result.logs)  # the entry that says so is gone
        return note

    def _compared(self, anchor: Checkpoint, last: Checkpoint, remaining: Mapping[int, bytes]) -> int | None:
        """The size of the anchor, if a remaining checkpoint of an erased log has that size."""
        if anchor.size > last.size:
            raise Wrong(CHECKPOINT, f"the log was cut or rolled back: it has {last.size} entries, {_KEPT} has {anchor.size}")
        if anchor.size not in remaining:
            self.result.uncompared += 1
            return None
        if remaining[anchor.size] != anchor.root:
            raise Wrong(CHECKPOINT, f"{_KEPT} was signed over other entries: the log was rewritten or forked")
        return anchor.size


def _verified(note: bytes, key: bytes, what: str) -> Checkpoint:
    try:
        return checkpoints.verify(note, key)
    except LacreError as exc:
        raise Wrong(what, str(exc)) from exc


def _of_log(checkpoint: Checkpoint, origin: str | None, what: str) -> Checkpoint:
    if origin is not None and checkpoint.origin != origin:
        raise Wrong(what, f"its origin is {checkpoint.origin}, and the log's is {origin}")
    return checkpoint


def _taken(anchors: list[Checkpoint], origin: str) -> list[Checkpoint]:
    """Moves the anchors of this origin out of the list."""
    own = [anchor for anchor in anchors if anchor.origin == origin]
    anchors[:] = [anchor for anchor in anchors if anchor.origin != origin]
    return own


class _Walk:
    """One pass over a log."""

    def __init__(self, folder: Path, key: bytes, story: Story) -> None:
        self._key = key
        self._partials = leftovers.named(folder)  # first: the gateway may write more before the snapshot, and never less
        self._snapshot = Snapshot.take(folder)
        self._folder = folder
        self.edge = Edge()
        self.story = story
        self.origin = ""
        self.note = self._snapshot.note or b""
        self.torn = 0
        self.anchored: int | None = None
        self._anchors: list[tuple[Checkpoint, str]] = []
        # Entries under the last checkpoint that agreed: of the log's own ones, and of kept ones, which the log cannot have
        # invented.
        self._good = {False: 0, True: 0}

    def run(self, kept: list[Checkpoint]) -> None:
        """kept: the checkpoints that were kept, of any log; this takes those of this log. Raises Wrong."""
        size = self._snapshot.size
        published = self._published()
        self._anchors = sorted([*self._history(), *self._kept(kept)], key=lambda anchor: anchor[0].size)
        for bundle in range(-(-size // tiles.WIDTH)):
            self._bundle(bundle, min(tiles.WIDTH, size - bundle * tiles.WIDTH))
        self._partial_rows()
        if published is not None and self.edge.root() != published.root:
            raise Wrong(CHECKPOINT, "its root is not that of the entries")
        self._journal()
        for checkpoint, what in self._anchors:
            place = f"entry {self.edge.size}"
            raise Wrong(place, f"the log was cut or rolled back: it has {self.edge.size} entries, {what} has {checkpoint.size}")
        leftovers.check(self._partials, self.edge, self._snapshot)

    def _published(self) -> Checkpoint | None:
        note = self._snapshot.note
        if note is None:
            if not self._snapshot.commits:
                raise Wrong(CHECKPOINT, "it is missing")
            return None
        checkpoint = _verified(note, self._key, CHECKPOINT)
        self.origin = checkpoint.origin
        return checkpoint

    def _history(self) -> Iterator[tuple[Checkpoint, str]]:
        for number, note in enumerate(notes_in(read_file(self._folder / HISTORY, MAX_GROWING) or b"")[0]):
            yield self._anchor(note, f"{HISTORY}, note {number},")

    def _kept(self, kept: list[Checkpoint]) -> Iterator[tuple[Checkpoint, str]]:
        first = next(journal.commits(self._snapshot.commits), None) if not self.origin else None
        for anchor in _taken(kept, self.origin if first is None else checkpoints.parse(first.note).origin):
            self.anchored = max(self.anchored or 0, anchor.size)
            yield anchor, _KEPT

    def _anchor(self, note: bytes, what: str) -> tuple[Checkpoint, str]:
        return _of_log(_verified(note, self._key, what), self.origin or None, what), what

    def _bundle(self, bundle: int, width: int) -> None:
        entries = self._snapshot.bundle(bundle, width)
        hashes = self._snapshot.tile(0, bundle, width)
        name = tiles.tile(None, bundle, width)
        for number, entry in enumerate(entries):
            if merkle.leaf_hash(entry) != hashes[number]:
                index = bundle * tiles.WIDTH + number
                raise Wrong(f"{name}, entry {index}", f"its hash differs from the one in {tiles.tile(0, bundle, width)}")
            self._take(entry, name)
        for level, row in enumerate(self.edge.rows):
            if level and len(row) == tiles.WIDTH:
                self._compare(level, self.edge.first(level) // tiles.WIDTH, row)
        if width == tiles.WIDTH:
            self.edge.drop_full(self.edge.size)

    def _take(self, entry: bytes, place: str) -> None:
        self.edge.append(entry)
        self._follow(self.edge.size - 1, entry, place)
        self._pass_anchors()

    def _follow(self, index: int, entry: bytes, place: str) -> None:
        try:
            self.story.follow(index, entry)
        except InvalidMessage as exc:
            raise Wrong(f"{place}, entry {index}", str(exc)) from exc

    def _pass_anchors(self) -> None:
        """Compares the tree with every checkpoint of its size. Those of size 0 say nothing."""
        while self._anchors and self._anchors[0][0].size <= self.edge.size:
            checkpoint, what = self._anchors.pop(0)
            if checkpoint.size == self.edge.size and checkpoint.root != self.edge.root():
                place = f"entries {self._good[what == _KEPT]} to {checkpoint.size - 1}"
                raise Wrong(place, f"{what} was signed over other entries: the log was rewritten or forked")
            self._good[what == _KEPT] = checkpoint.size

    def _partial_rows(self) -> None:
        for level, row in enumerate(self.edge.rows):
            if level and row:
                self._compare(level, self.edge.first(level) // tiles.WIDTH, row)

    def _compare(self, level: int, index: int, row: Sequence[bytes]) -> None:
        name = tiles.tile(level, index, len(row))
        for number, (found, due) in enumerate(zip(self._snapshot.tile(level, index, len(row)), row, strict=True)):
            if found != due:
                below = tiles.tile(level - 1, index * tiles.WIDTH + number)
                raise Wrong(f"{name}, hash {number}", f"it is not that of {below}")

    def _journal(self) -> None:
        for commit, checkpoint in replay(self.edge, self._snapshot.commits, self._key, self._pass_anchors):
            self.origin, self.note = self.origin or checkpoint.origin, commit.note
            if checkpoint.origin != self.origin:
                raise Wrong("journal", f"a commit of {checkpoint.origin}, and the log is {self.origin}")
            for index, entry in enumerate(commit.entries, checkpoint.size - len(commit.entries)):
                self._follow(index, entry, "journal")
        self.torn = len(self._snapshot.journal) - journal.whole(self._snapshot.journal)
