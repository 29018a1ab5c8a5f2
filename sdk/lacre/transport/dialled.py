"""Records where a request's connection went: to the gateway, or to a proxy before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import httpx2

DIALLED: Final = "lacre.dialled"  # of a request's extensions: a `Dialled`
Trace = Callable[[str, dict[str, Any]], None]


class Dialled:
    """The address of a request's connection, as `httpcore2` traces it: with a proxy, the proxy's.

    then: also gets each event, if given.
    """

    def __init__(self, then: Trace | None = None) -> None:
        self.to: tuple[str, int] | None = None
        self._then = then

    def watch(self, request: httpx2.Request) -> None:
        """Makes the request record it, for the errors that it may end in."""
        request.extensions |= {"trace": self.trace, DIALLED: self}

    def awatch(self, request: httpx2.Request) -> None:
        """The same for async clients."""
        request.extensions |= {"trace": self.atrace, DIALLED: self}

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """A `trace` extension of httpcore."""
        if event.endswith("connect_tcp.started"):
            self.to = (str(info.get("host")), int(info.get("port") or 0))
        if self._then is not None:
            self._then(event, info)

    async def atrace(self, event: str, info: dict[str, Any]) -> None:
        """The same for async clients."""
        self.trace(event, info)
