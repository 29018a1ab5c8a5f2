"""The programs of a practice deployment, and `volume`: a small file system, which takes root to mount."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from parts.runbooks import Stage, programs
from parts.small_disk import NO_DISK, small_disk


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    if NO_DISK is not None:
        pytest.skip(NO_DISK)
    with small_disk(folder / "volume", "4m"):
        async with programs(folder) as stage:
            yield stage
