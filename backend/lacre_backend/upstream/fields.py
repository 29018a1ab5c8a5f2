"""Decides which header fields may be forwarded, in both directions.

Rules:
- Connection headers are not forwarded (RFC 9110 section 7.6.1): the fields named there, and those that `Connection` names.
- A client's headers that identify it are never forwarded, regardless of the settings.
- A header of the connection or of the content cannot be set as a credential.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

Headers = Sequence[tuple[bytes, bytes]]

OF_A_CONNECTION: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
OURS: Final = "lacre-"  # only the worker itself sets such headers
# Headers that an upstream must not send to a client. A cookie identifies returning clients; the others describe a server that
# the client does not talk to.
_NOT_PASSED_ON: Final = frozenset({b"set-cookie", b"set-cookie2", b"alt-svc", b"strict-transport-security", b"server", b"via"})
_OF_THE_MESSAGE: Final = frozenset(
    {"host", "content-length", "content-encoding", "accept-encoding", "expect"} | {name.decode() for name in OF_A_CONNECTION}
)
_OF_THE_CALLER: Final = frozenset({"authorization", "cookie", "user-agent"})
OF_THE_CONTENT: Final = frozenset({"accept", "content-type", "inference-header-content-length"})  # the last: of binary tensors


def may_be_passed_on(name: str) -> bool:
    """Whether a client's header may be forwarded. name: in lower case."""
    return name not in _OF_THE_MESSAGE | _OF_THE_CALLER and not name.startswith(OURS)


def may_be_a_credential(name: str) -> bool:
    """Whether the worker may set this header to a fixed value. name: in lower case."""
    return name not in _OF_THE_MESSAGE | OF_THE_CONTENT and not name.startswith(OURS)


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The end-to-end fields, with names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in lowered if name == b"connection" for part in value.split(b",")}
    left_out = OF_A_CONNECTION | _NOT_PASSED_ON | named
    ours = OURS.encode()
    return ((name, value) for name, value in lowered if name not in left_out and not name.startswith(ours))
