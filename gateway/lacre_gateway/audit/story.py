"""The order of entries that a log must have, over all logs that continue each other. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lacre.errors import InvalidMessage, LacreError
from lacre.evidence import checkpoints
from lacre.jose.jws import b64u_decode
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.entries import Annex, Intent, LogLink, Outcome, parse_known


@dataclass(slots=True)
class Story:
    """Checks the order of entries over all logs: each intent has one outcome, each annex its intent, and each log its end.

    before: the last checkpoint of the log before; None if there is none here. complete: whether all entries of that log were
    read. strangers: how many requests of logs that are not here have no outcome yet. ended: the origin that continues the log.
    erased: the logs that retention erased, each with its size. next_key: of the log that continues it, if it is another one.
    continues: the origin in the link, if there is no log before.
    """

    open: dict[str, int] = field(default_factory=dict)
    annex: tuple[str, str] | None = None
    requests: int = 0
    before: bytes | None = None
    complete: bool = False
    strangers: int = 0
    ended: str | None = None
    erased: dict[str, int] = field(default_factory=dict)
    next_key: bytes | None = None
    continues: str | None = None

    def begin(self, before: bytes | None, *, complete: bool) -> None:
        """Before the first entry of each log."""
        self.before, self.complete, self.ended, self.next_key = before, complete, None, None
        if not complete:
            self.open.clear()
            self.strangers = 0

    @property
    def under_way(self) -> int:
        return len(self.open) + self.strangers

    def follow(self, index: int, data: bytes) -> None:
        """Raises InvalidMessage, which says what is wrong."""
        members = parse_known(data)
        kind = members["kind"]
        annex, self.annex = self.annex, None
        if self.ended is not None:
            raise InvalidMessage("it is after the entry that ends the log")
        if (kind == LogLink.kind) is not (index == 0 and (self.before is not None or kind == LogLink.kind)):
            raise InvalidMessage("a link that is not the first entry" if index else "it is no link to the log before")
        if annex is not None and (kind != Intent.kind or (members["request_id"], members["annex"]) != annex):
            raise InvalidMessage("the annex before it has no intent")
        if kind == Annex.kind:
            self.annex = members["request_id"], hashlib.sha256(data).hexdigest()
        elif kind == Intent.kind:
            self._intent(index, members, annex)
        elif kind == Outcome.kind:
            self._outcome(members["request_id"])
        elif kind == LogLink.kind:
            self._link(members)
        else:
            self._event(members)

    def _intent(self, index: int, members: dict[str, Any], annex: tuple[str, str] | None) -> None:
        if members["annex"] is not None and annex is None:
            raise InvalidMessage("its annex is not before it")
        if members["request_id"] in self.open:
            raise InvalidMessage("it is a second intent of one request")
        self.open[members["request_id"]] = index
        self.requests += 1

    def _outcome(self, request: str) -> None:
        if self.open.pop(request, None) is None:
            self.strangers -= 1
            if self.strangers < 0:
                raise InvalidMessage("the outcome has no intent, or is a second one")

    def _link(self, members: dict[str, Any]) -> None:
        checkpoint, count = members["checkpoint"], members["open"]
        if not isinstance(checkpoint, str) or not isinstance(count, int):
            raise InvalidMessage("it is no link to the log before")
        if self.before is not None and checkpoint.encode() != self.before:
            raise InvalidMessage("it does not hold the last checkpoint of the log before")
        if self.before is None:
            self.continues = _origin(checkpoint)
        if self.complete and count != self.under_way:
            raise InvalidMessage(f"it names {count} open requests, and the log before has {self.under_way}")
        if not self.complete:
            self.strangers = count

    def _event(self, members: dict[str, Any]) -> None:
        event = members.get("event")
        if event == kinds.STARTED and self.open:
            raise InvalidMessage(f"it is a start, but the intent of entry {min(self.open.values())} has no outcome")
        if event == kinds.STARTED and self.strangers:
            raise InvalidMessage(f"it is a start, but {self.strangers} requests of older logs have no outcome")
        if event == kinds.ROTATED:
            self.ended, self.next_key = str(members["target"]), next_key(members)
        elif event == kinds.ERASED:
            self.erased[str(members["target"])] = members["count"]


def _origin(checkpoint: str) -> str:
    try:
        return checkpoints.parse(checkpoint.encode()).origin
    except LacreError as exc:
        raise InvalidMessage("it is no link to the log before") from exc


def next_key(members: Mapping[str, Any]) -> bytes | None:
    """The key of the next log, as the last entry of a log names it; None if the key stays. Raises InvalidMessage."""
    named = members.get("reason")
    return None if named is None else b64u_decode(str(named))
