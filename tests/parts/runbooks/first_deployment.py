"""A folder with the provider's program. The ports are free ones, because the machine may run another deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lacre_fabric.operate.nats_server import free_port
from parts.runbooks import Stage

ISSUER = Path(__file__).resolve().parents[3] / "examples" / "site" / "issuer"


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    (folder / ISSUER.name).symlink_to(ISSUER)
    yield Stage({f"{name}_PORT": str(free_port()) for name in ("NATS", "ISSUER", "GATEWAY")})
