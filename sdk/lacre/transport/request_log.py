"""One line of a program's log for each request that leaves it, and that is the one to the gateway.

A sealed client is an HTTP client itself, and its library logs what it is asked for as if it went to an address. Nothing does:
`lacre.invalid` stands inside the seal (RFC 2606 section 2). So that line says again what the gateway's says.
"""

from __future__ import annotations

import logging
from typing import Final

from lacre.wire.header import AUTHORITY


class _InnerAddress(logging.Filter):
    """Drops what is logged of requests to the address inside the seal."""

    def filter(self, record: logging.LogRecord) -> bool:
        parts = record.args if isinstance(record.args, tuple) else ()
        return all(getattr(part, "host", None) != AUTHORITY for part in parts)


_FILTER: Final = _InnerAddress()


def once(library: str) -> None:
    """library: `httpx2` or `httpx`, whose logger it is. Idempotent."""
    logging.getLogger(library).addFilter(_FILTER)  # which adds one filter once
