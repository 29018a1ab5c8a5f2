"""A frame is one message from a worker to the gateway that waits for it. NATS headers carry its attempt, sequence and kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Final

from lacre.errors import InvalidMessage
from lacre.jose.formats import HEADER, Format
from lacre.runtime.records import record

FRAME: Final = Format("frame", "gateway")
ATTEMPT: Final = "A"
SEQUENCE: Final = "S"
KIND: Final = "K"
MAC: Final = "M"  # of the receipt in it, for its gateway alone: see `settlement_keys`
MAX_PAYLOAD: Final = 256 * 1024  # bytes: a worker's whole credit
MAX_BLOCK: Final = 1024  # bytes of headers; ours take about 140, and a NATS proxy may add its own
TAKEN: Final = b"taken"  # repeated until the first frame of the answer
DECLINED: Final = b"declined"  # the work never began here
_ATTEMPT: Final = re.compile(r"[0-9a-f]{32}")
_SEQUENCE: Final = re.compile(r"0|[1-9][0-9]{0,11}")
_MAC: Final = re.compile(r"[0-9a-f]{64}")
# The headers as our workers write them. One regular expression reads them: parsing them into a dictionary would cost a gateway
# more than the rest of a frame.
_BLOCK: Final = re.compile(
    rb"NATS/1\.0\r\nA: ([0-9a-f]{32})\r\nS: (0|[1-9][0-9]{0,11})\r\nK: (data|usage|error|beat|stopped|offer)\r\n"
    rb"(?:M: ([0-9a-f]{64})\r\n)?\r\n"
)


class FrameKind(StrEnum):
    """What a frame carries.

    - data: bytes to forward unchanged.
    - usage: the final receipt; ends the answer.
    - error: a problem type; ends the answer.
    - beat: a heartbeat, once a second, with the receipt so far if there is one.
    - stopped: the gateway withdrew the work; ends it with the receipt so far.
    - offer: `TAKEN` or `DECLINED`, about work that the gateway offered to this worker. No frame of the answer: its number is 0.
    """

    DATA = "data"
    USAGE = "usage"
    ERROR = "error"
    BEAT = "beat"
    STOPPED = "stopped"
    OFFER = "offer"


_KINDS: Final = {kind.value: kind for kind in FrameKind}
_WRITTEN: Final = {kind.value.encode(): kind for kind in FrameKind}


@record(frozen=True, slots=True)
class Frame:
    """One message of an answer. attempt: 32 hex digits that identify one worker's try. sequence: counts all of the attempt's
    frames from 0. mac: of the receipt in it (`settlement_keys`); empty: there is none.
    """

    attempt: str
    sequence: int
    kind: FrameKind
    payload: bytes = field(repr=False)
    mac: bytes = field(default=b"", repr=False)

    def headers(self) -> dict[str, str]:
        said = {ATTEMPT: self.attempt, SEQUENCE: str(self.sequence), KIND: self.kind.value}
        return said | {MAC: self.mac.hex()} if self.mac else said

    @classmethod
    def read(cls, block: bytes, payload: bytes) -> Frame:
        """block: the headers as on the wire. Raises InvalidMessage."""
        if len(block) > MAX_BLOCK:
            raise InvalidMessage("a frame with more headers than a frame has")
        match = _BLOCK.fullmatch(block)
        if match is None or len(payload) > MAX_PAYLOAD:
            return cls.parse(_fields(block), payload)
        attempt, sequence, kind, mac = match.groups()
        return cls(attempt.decode(), int(sequence), _WRITTEN[kind], payload, bytes.fromhex(mac.decode()) if mac else b"")

    @classmethod
    def parse(cls, headers: Mapping[str, str] | None, payload: bytes) -> Frame:
        """Raises InvalidMessage or NewerFormat."""
        headers = headers or {}
        FRAME.check_header(headers.get(HEADER))
        attempt, sequence, kind = headers.get(ATTEMPT, ""), headers.get(SEQUENCE, ""), _KINDS.get(headers.get(KIND, ""))
        if not _ATTEMPT.fullmatch(attempt) or not _SEQUENCE.fullmatch(sequence) or kind is None:
            raise InvalidMessage("a frame without an attempt, a sequence number or a kind")
        if len(payload) > MAX_PAYLOAD:
            raise InvalidMessage("a frame larger than a worker's whole credit")
        mac = headers.get(MAC, "")  # one in another form does not count
        return cls(attempt, int(sequence), kind, payload, bytes.fromhex(mac) if _MAC.fullmatch(mac) else b"")


def _fields(block: bytes) -> dict[str, str]:
    """The fields of a header block; its first line is the version."""
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    return {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
