"""A frame: one message from a worker to the gateway that waits for it. Attempt, sequence and kind stand in NATS headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from lacre.errors import InvalidMessage

ATTEMPT: Final = "A"
SEQUENCE: Final = "S"
KIND: Final = "K"
MAX_PAYLOAD: Final = 256 * 1024  # bytes; as much as a worker's whole credit
_ATTEMPT: Final = re.compile(r"[0-9a-f]{32}")
_SEQUENCE: Final = re.compile(r"0|[1-9][0-9]{0,11}")


class Kind(StrEnum):
    """data: bytes to forward verbatim. usage: the final receipt, and the end. error: a problem type, and the end.
    beat: a sign of life, once a second, with the receipt so far where there is one.
    """  # fmt: skip

    DATA = "data"
    USAGE = "usage"
    ERROR = "error"
    BEAT = "beat"


_KINDS: Final = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Frame:
    """attempt: 32 hex digits, this worker's try at the work. sequence: counts all of the attempt's frames from 0."""

    attempt: str
    sequence: int
    kind: Kind
    payload: bytes = field(repr=False)

    def headers(self) -> dict[str, str]:
        return {ATTEMPT: self.attempt, SEQUENCE: str(self.sequence), KIND: self.kind.value}

    @classmethod
    def parse(cls, headers: Mapping[str, str] | None, payload: bytes) -> Frame:
        """Raises InvalidMessage."""
        headers = headers or {}
        attempt, sequence, kind = headers.get(ATTEMPT, ""), headers.get(SEQUENCE, ""), _KINDS.get(headers.get(KIND, ""))
        if not _ATTEMPT.fullmatch(attempt) or not _SEQUENCE.fullmatch(sequence) or kind is None:
            raise InvalidMessage("a frame without an attempt, a sequence number or a kind")
        if len(payload) > MAX_PAYLOAD:
            raise InvalidMessage("a frame larger than a worker's whole credit")
        return cls(attempt, int(sequence), kind, payload)
