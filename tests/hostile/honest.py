"""An honest gateway, the real one, over a fabric that somebody else owns."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hostile.stage import MODEL, OTHER_MODEL, Keys
from lacre.jose.jws import b64u, raw_public_key
from lacre_fabric.logs import make_log
from lacre_fabric.nats.kv import MemoryBucket
from lacre_gateway.app import create_app
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.gateway import Gateway, build
from lacre_gateway.settings import parse
from parts.gateway import AUDIENCE, ISSUER, Issuer
from parts.memory_fabric import MemoryFabric


class HonestGateway:
    """Reads its manifest from the fabric, trusts the root, and lets alice do what the shipped policies allow."""

    def __init__(
        self, folder: Path, keys: Keys, issuer: Issuer, fetch: Callable[[], Awaitable[bytes | None]], queue_limit: float = 20.0
    ) -> None:
        (folder / "jwks.json").write_text(json.dumps(issuer.jwks()))
        self.log = io.StringIO()
        self.audit = folder / "audit"
        self.token = issuer.token()
        settings = parse(_settings(keys, queue_limit), folder / "gateway.toml")
        self.gateway: Gateway = build(settings, keys.gateway, make_log(self.log), fetch)
        self.app = create_app(self.gateway)

    async def start(self, fabric: MemoryFabric) -> None:
        self.gateway.fabric = fabric.gateway()
        self.gateway.budgets.bucket = MemoryBucket()
        await self.gateway.feed.refresh()
        await self.gateway.revocations.start(self.gateway.connected)

    def entries(self) -> list[bytes]:
        """What is in its audit log."""
        return list(LogReader(self.audit).entries())

    async def close(self) -> None:
        await self.gateway.close()

    async def outcomes(self, number: int = 1) -> list[dict[str, Any]]:
        """The outcomes in its audit record, once there are so many."""
        async with asyncio.timeout(10):
            while True:
                entries = [json.loads(entry) for entry in self.entries()]
                ended = [entry for entry in entries if entry["kind"] == "outcome"]
                if len(ended) >= number:
                    return ended
                await asyncio.sleep(0.002)


def _settings(keys: Keys, queue_limit: float) -> str:
    return f"""
        gateway = "g1"
        public_url = "http://127.0.0.1:8321"
        trust = "{b64u(raw_public_key(keys.root))}"
        signing_key = "grant.key"
        audit = "audit"
        [nats]
        url = "nats://127.0.0.1:4222"
        credentials = "gateway.creds"
        [[issuers]]
        issuer = "{ISSUER}"
        audience = "{AUDIENCE}"
        algorithms = ["EdDSA"]
        jwks = "jwks.json"
        [limits]
        queue_limit = {queue_limit}
        [models."{MODEL}"]
        context = 2048
        [models."{OTHER_MODEL}"]
        context = 2048
    """
