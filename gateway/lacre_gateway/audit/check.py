"""Whether a log holds: checks every byte from the first entry to the newest checkpoint, and names the first fault.

Rules:
- Everything is computed again from the entries, and compared with the files in the order of the log.
- A log proves only that it agrees with itself. A kept checkpoint proves that nothing before it was changed, cut or forked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lacre.errors import InvalidMessage, InvalidProof, LacreError
from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import journal, tiles
from lacre_gateway.audit.edge import Edge
from lacre_gateway.audit.entries import Annex, Intent, Outcome, parse
from lacre_gateway.audit.reader import CHECKPOINT, LogReader, Snapshot, Wrong, own_key, read_file, replay
from lacre_gateway.audit.store import HISTORY, notes_in

SELF_CONSISTENT: Final = "self-consistent only"
_KEPT: Final = "the checkpoint kept elsewhere"


@dataclass(slots=True)
class AuditResult:
    """The result. under_way: intents without an outcome since the last start; they may still get one.

    anchored: the size of the largest kept checkpoint that the log agrees with; None if none was given. torn: bytes of an
    unfinished commit at the end of the journal; no answer depended on it.
    """

    origin: str
    size: int
    root: bytes
    requests: int
    under_way: int
    torn: int
    anchored: int | None
    wrong: Wrong | None = None

    @property
    def words(self) -> str:
        if self.wrong is not None:
            return f"does not hold: {self.wrong}"
        if self.anchored is None:
            return SELF_CONSISTENT
        return f"holds, and extends the kept checkpoint of {self.anchored} entries"


def verify(folder: Path, key: bytes | None = None, kept: Sequence[bytes] = ()) -> AuditResult:
    """key: the gateway's, if it is known apart from the log. kept: checkpoints (signed notes) that were kept outside it.

    Raises SettingsError if the folder is not a log or cannot be read.
    """
    walk = _Walk(folder, own_key(folder) if key is None else key)
    wrong: Wrong | None = None
    try:
        walk.run(kept)
    except Wrong as exc:
        wrong = exc
    edge = walk.edge
    return AuditResult(
        origin=walk.origin,
        size=edge.size,
        root=edge.root(),
        requests=walk.story.requests,
        under_way=len(walk.story.open),
        torn=walk.torn,
        anchored=walk.anchored,
        wrong=wrong,
    )


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


@dataclass(slots=True)
class _Story:
    """Checks the order of entries: each intent has one outcome, and each annex its intent."""

    open: dict[str, int] = field(default_factory=dict)
    annex: tuple[str, str] | None = None
    requests: int = 0

    def follow(self, index: int, data: bytes) -> None:
        """Raises InvalidMessage, which says what is wrong."""
        members = parse(data)
        kind = members["kind"]
        annex, self.annex = self.annex, None
        if annex is not None and (kind != Intent.kind or (members["request_id"], members["annex"]) != annex):
            raise InvalidMessage("the annex before it has no intent")
        if kind == Annex.kind:
            self.annex = members["request_id"], hashlib.sha256(data).hexdigest()
        elif kind == Intent.kind:
            self._intent(index, members, annex)
        elif kind == Outcome.kind:
            if self.open.pop(members["request_id"], None) is None:
                raise InvalidMessage("the outcome has no intent, or is a second one")
        elif members.get("event") == kinds.STARTED and self.open:
            raise InvalidMessage(f"it is a start, but the intent of entry {min(self.open.values())} has no outcome")

    def _intent(self, index: int, members: dict[str, Any], annex: tuple[str, str] | None) -> None:
        if members["annex"] is not None and annex is None:
            raise InvalidMessage("its annex is not before it")
        if members["request_id"] in self.open:
            raise InvalidMessage("it is a second intent of one request")
        self.open[members["request_id"]] = index
        self.requests += 1


class _Walk:
    """One pass over the log."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._key = key
        self._snapshot = Snapshot.take(folder)
        self._folder = folder
        self.edge = Edge()
        self.story = _Story()
        self.origin = ""
        self.torn = 0
        self.anchored: int | None = None
        self._anchors: list[tuple[Checkpoint, str]] = []
        # Entries under the last checkpoint that agreed: of the log's own ones, and of kept ones, which the log cannot have
        # invented.
        self._good = {False: 0, True: 0}

    def run(self, kept: Sequence[bytes]) -> None:
        """Raises Wrong."""
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

    def _published(self) -> Checkpoint | None:
        note = self._snapshot.note
        if note is None:
            if not self._snapshot.commits:
                raise Wrong(CHECKPOINT, "it is missing")
            return None
        try:
            checkpoint = checkpoints.verify(note, self._key)
        except LacreError as exc:
            raise Wrong(CHECKPOINT, str(exc)) from exc
        self.origin = checkpoint.origin
        return checkpoint

    def _history(self) -> Iterator[tuple[Checkpoint, str]]:
        for number, note in enumerate(notes_in(read_file(self._folder / HISTORY, None) or b"")[0]):
            yield self._anchor(note, f"{HISTORY}, note {number},")

    def _kept(self, kept: Sequence[bytes]) -> Iterator[tuple[Checkpoint, str]]:
        for note in kept:
            anchor = self._anchor(note, _KEPT)
            self.anchored = max(self.anchored or 0, anchor[0].size)
            yield anchor

    def _anchor(self, note: bytes, what: str) -> tuple[Checkpoint, str]:
        try:
            checkpoint = checkpoints.verify(note, self._key)
        except LacreError as exc:
            raise Wrong(what, str(exc)) from exc
        if self.origin and checkpoint.origin != self.origin:
            raise Wrong(what, f"its origin is {checkpoint.origin}, and the log's is {self.origin}")
        return checkpoint, what

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
            self.origin = self.origin or checkpoint.origin
            if checkpoint.origin != self.origin:
                raise Wrong("journal", f"a commit of {checkpoint.origin}, and the log is {self.origin}")
            for index, entry in enumerate(commit.entries, checkpoint.size - len(commit.entries)):
                self._follow(index, entry, "journal")
        self.torn = len(self._snapshot.journal) - journal.whole(self._snapshot.journal)
