"""A program's log: one line of ours for each call, and one of the HTTP library for each request that leaves.

The logger `lacre` gets a line when a call ends, at the level INFO. It has ids, names, numbers and times, and never content.

A sealed client is itself an HTTP client, and its library logs the inner request as if it went to an address. But
`lacre.invalid` is only inside the seal (RFC 2606 section 2). So that line only repeats the gateway's.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from lacre.errors import LacreError
from lacre.evidence.exchange_info import Facts
from lacre.evidence.recent import RECENT
from lacre.wire.header import AUTHORITY

_log: Final = logging.getLogger("lacre")
_LINE: Final = "request_id=%s action=%s model=%s status=%s outcome=%s attempts=%d head=%.3f total=%.3f"


class _InnerAddress(logging.Filter):
    """Drops records of requests to the address inside the seal."""

    def filter(self, record: logging.LogRecord) -> bool:
        parts = record.args if isinstance(record.args, tuple) else ()
        return all(getattr(part, "host", None) != AUTHORITY for part in parts)


_FILTER: Final = _InnerAddress()


def once(library: str) -> None:
    """library: `httpx2` or `httpx`; its logger gets the filter. Idempotent."""
    logging.getLogger(library).addFilter(_FILTER)  # adds one filter only once


class CallLog:
    """One call, from its beginning until its answer was read or left. The times are in seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._headed = self._began
        self._over = False

    def headed(self) -> None:
        """The answer's head is there."""
        self._headed = time.monotonic()

    def ended(self, facts: Facts, status: int, outcome: str) -> None:
        """outcome: `whole`, `left` or `refused`. Does nothing the second time."""
        if self._over:
            return
        self._over = True
        RECENT.keep(facts)
        self._write(facts.request_id, (facts.action or "-", facts.model or "-", status, outcome, facts.attempts))

    def failed(self, error: BaseException) -> None:
        """The call ended without an answer."""
        request_id = error.request_id if isinstance(error, LacreError) else None
        self._write(request_id, ("-", "-", "-", type(error).__name__, 0))

    def _write(self, request_id: str | None, known: tuple[object, ...]) -> None:
        if _log.isEnabledFor(logging.INFO):
            now = time.monotonic()
            head = (self._headed if self._headed > self._began else now) - self._began
            _log.info(_LINE, request_id or "-", *known, head, now - self._began)
