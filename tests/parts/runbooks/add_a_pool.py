"""A site (`site`) and its three message servers (`n1`, `n2`, `n3`), while callers use the first pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from parts.runbooks import Stage
from parts.three_servers import deployed


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    async with deployed(folder) as deployment:
        await deployment.serve()

        async def check(said: str) -> None:
            assert set(deployment.ended) == {"whole"}, said

        yield Stage(check=check)
