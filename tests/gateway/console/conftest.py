"""A gateway in this process whose admin app has the console, and people at it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from parts.console_browser import SETTINGS, Desk, Person
from parts.stage import Stage

PutUp = Callable[..., Awaitable[Stage]]


@pytest.fixture
async def desk(put_up: PutUp) -> Desk:
    return Desk(await put_up(settings=SETTINGS))


@pytest.fixture
async def root(desk: Desk) -> Person:
    """Whom the rules permit everything."""
    return await desk.signed_in()
