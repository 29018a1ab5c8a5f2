"""What NATS answers to a message that a gateway publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.runtime.records import record
from lacre_fabric.native.json_bytes import read_object
from lacre_fabric.nats.connection import STORE_FAILED, TOO_MANY_REQUESTS
from lacre_fabric.work.contract import DuplicateWork, FabricError, FabricUnavailable, NoQueue, QueueFull

_NO_RESPONDERS: Final = b"NATS/1.0 503"
_MAX_TEXT: Final = 200  # characters of an error's text, which goes to the log


@record(frozen=True, slots=True)
class Ack:
    """JetStream's answer to a publish. block: headers, as on the wire."""

    block: bytes
    payload: bytes = field(repr=False)

    @property
    def nobody(self) -> bool:
        """Whether nobody listens: the message reached no one."""
        return self.block.startswith(_NO_RESPONDERS)

    def sequence(self) -> int:
        """Raises DuplicateWork, QueueFull or FabricUnavailable."""
        if self.nobody:
            raise NoQueue("the pool has no queue: run `lacre up`, or provision the fabric")
        try:
            said = read_object(self.payload, "the ack")
            error = said.get("error")
            if error is not None:
                raise _refused(error)
            if said.get("duplicate"):
                raise DuplicateWork("this sealed request was published before")
            return Members(said, "the ack").count("seq")
        except (AttributeError, InvalidMessage) as exc:
            raise FabricUnavailable("NATS sent an invalid ack: check that the pool's queue is a JetStream stream") from exc


def _refused(error: Mapping[str, Any]) -> FabricError:
    if error.get("err_code") == STORE_FAILED:
        return QueueFull("the pool's queue is full")
    if error.get("err_code") == TOO_MANY_REQUESTS:
        return NoQueue("the pool's queue has too many writes waiting: a client floods it")
    return FabricUnavailable(f"NATS refuses: {str(error.get('description', 'no reason given'))[:_MAX_TEXT]}")


DENIED: Final = Ack(b"", b"")  # in place of NATS's answer: NATS denied the message, so it reached nobody
