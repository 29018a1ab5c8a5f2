"""A gateway in this process whose admin app has the console."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from parts.console_browser import SETTINGS, Desk
from parts.stage import Stage


@pytest.fixture
async def desk(put_up: Callable[..., Awaitable[Stage]]) -> Desk:
    return Desk(await put_up(settings=SETTINGS))
