"""Waiting for what comes about in its own time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0  # seconds; the machine may be busy


def _nothing() -> str:
    return "it did not come to pass"


async def until(condition: Callable[[], Any], seconds: float = 10, why: Callable[[], object] = _nothing) -> None:
    """condition: what it returns is awaited if it can be. why: what a failure says."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return
        assert time.monotonic() < deadline, why()
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], Any], seconds: float = 10, why: Callable[[], object] = _nothing) -> None:
    """The same, for tests that block."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)
