"""The steps between `lacre.exchange.call` and the transports: what an exchange asks of the network.

A generator of steps yields what to do. The transport sends back the result, or throws the `LacreError` of the failure. So the
sync transport, the async one and the tests all drive the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lacre.errors import UsageError


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the gateway, and send back an `Outer`.

    sealed: SHA-256 of `hdr ‖ enc` of the sealed request in it. A sealed request needs the access token, and has timeouts of its
    own. named: needs the access token, and is not sealed.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=b"", repr=False)
    sealed: bytes | None = None
    named: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """Read more of the last response's body, and send back its next bytes; None at its end."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait so many seconds, and send back None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Get another token than the last one, and send back whether there is one."""


@dataclass(frozen=True, slots=True)
class Outer:
    """What the gateway's own response says. audit: its `Lacre-Audit`. request_id: its `Lacre-Request-Id`, if well-formed.
    speaks_for: whom the token in the request names. token_expires: when that token says that it expires, in seconds since the
    epoch. manifest: the version that the gateway has, as its `Lacre-Manifest` says.
    """  # fmt: skip

    status: int
    content_type: str = ""
    retry_after: float | None = None
    audit: str = ""
    speaks_for: Mapping[str, object] = field(default_factory=dict)
    request_id: str | None = None
    token_expires: float | None = None
    manifest: int | None = None


@dataclass(frozen=True, slots=True)
class Offload:
    """Call this outside the event loop, because it may take a while, and send back None."""

    do: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Together:
    """Do these steps once for all calls of the client that want them now, and send back None.

    wanted: whether they are still to be done. do: makes them. endurance: seconds for their tries. beside: whether the response
    that is being read stays open meanwhile.
    """

    wanted: Callable[[], bool]
    do: Callable[[], Steps[None]]
    endurance: float
    beside: bool = False


Step = Send | Read | Wait | Renew | Offload | Together
Done = Outer | bytes | bool | None  # the result of a step
T = TypeVar("T")
Steps = Generator[Step, Done, T]


def sent_outer(sent: Done) -> Outer:
    if not isinstance(sent, Outer):
        raise UsageError("send back an Outer after Send")
    return sent


def sent_bytes(sent: Done) -> bytes | None:
    if isinstance(sent, Outer | bool):
        raise UsageError("send back bytes or None after Read")
    return sent
