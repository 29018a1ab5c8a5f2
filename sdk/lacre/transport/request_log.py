"""Keeps a program's log to one line for each request that leaves it: the one to the gateway.

A sealed client is itself an HTTP client, and its library logs the inner request as if it went to an address. But
`lacre.invalid` is only inside the seal (RFC 2606 section 2). So that line only repeats the gateway's.
"""

from __future__ import annotations

import logging
from typing import Final

from lacre.wire.header import AUTHORITY


class _InnerAddress(logging.Filter):
    """Drops records of requests to the address inside the seal."""

    def filter(self, record: logging.LogRecord) -> bool:
        parts = record.args if isinstance(record.args, tuple) else ()
        return all(getattr(part, "host", None) != AUTHORITY for part in parts)


_FILTER: Final = _InnerAddress()


def once(library: str) -> None:
    """library: `httpx2` or `httpx`; its logger gets the filter. Idempotent."""
    logging.getLogger(library).addFilter(_FILTER)  # adds one filter only once
