"""`lacre proxy`."""

from __future__ import annotations


def proxy() -> None:
    """To come."""
