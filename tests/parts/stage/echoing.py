"""One gateway as it runs in earnest, whose nodes echo: it is killed, started again, and starved of disk.

The nodes live in the test's process. Clients ask without an end (`load`).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

import lacre
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import raw_public_key
from lacre_backend.api.app import create_app
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats.roles import Role
from parts.echo_engine import EchoEngine
from parts.stage.live import LiveStage
from parts.stage.processes import GatewayProcess
from parts.stage.settings import POOL
from parts.waiting import PATIENCE, until

ECHO = "echo"
SLOTS = 32
PAUSE = 0.12  # seconds between a client's questions: fewer than the default plan allows, however fast the machine


class Kept(httpx2.AsyncHTTPTransport):
    """A client's connections, which keep the proof of whatever came back, whole or not, answer or refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.proofs: list[AuditProof] = []
        self.problems: list[tuple[int, str]] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if audit_proof.HEADER in response.headers:
            self.proofs.append(AuditProof.parse_header(response.headers[audit_proof.HEADER]))
        if response.status_code != 200:
            self.problems.append((response.status_code, response.headers.get("retry-after", "")))
        return response


@dataclass
class Load:
    """Clients that ask one question after another. failed: by the name of the error."""

    whole: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wires: list[Kept] = field(default_factory=list)

    @property
    def proofs(self) -> list[AuditProof]:
        return [proof for wire in self.wires for proof in wire.proofs]


class EchoStage(LiveStage):
    """policies: its rule set, if it is not the one that ships. audit: the log's folder."""

    def __init__(
        self, folder: Path, *, policies: Path | None = None, audit: Path | None = None, pools: Sequence[str] = (POOL,)
    ) -> None:
        super().__init__(folder, dict.fromkeys(pools, (ECHO,)))
        self.audit = audit or self.site.folder / "gateway" / "audit"
        self._policies = f'policies = "{policies}"\n' if policies else ""

    @classmethod
    @asynccontextmanager
    async def standing(cls, folder: Path, **options: Any) -> AsyncIterator[Self]:
        """Set up, and not started yet."""
        async with cls(folder, **options) as stage:
            await stage.set_up()
            yield stage

    def more_roles(self) -> list[Role]:
        """Beside the site's own."""
        return []

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.gateways[0].process

    @property
    def log(self) -> Path:
        return self.gateways[0].log

    @property
    def base_url(self) -> str:
        return self.gateways[0].base_url

    @property
    def url(self) -> str:
        return self.gateways[0].url

    @property
    def key(self) -> bytes:
        """The public key of grants and checkpoints."""
        return raw_public_key(read_ed25519(self.site.folder / "gateway" / "grant.pem"))

    async def set_up(self) -> None:
        """Everything but the gateway."""
        await self.start_fabric(more=self.more_roles())
        base_url = f"http://127.0.0.1:{self.write_settings({'name': ECHO})}"
        path, url = self.site.gateway_settings, self.site.connection_string(base_url)
        path.write_text(self._policies + path.read_text().replace('audit = "audit"', f'audit = "{self.audit}"'))
        self.gateways.append(GatewayProcess("gateway", path, self.site.log("gateway"), base_url, url))
        for pool in self.site.pools:
            engine = EchoEngine(name=ECHO, delay=0.003)
            self.stack.callback(engine.close)
            await self.node(create_app([engine]), pool, slots=SLOTS)

    async def start(self) -> None:
        """Returns when it is ready."""
        self.gateways[0].start()
        await self.until(self.ready)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        return await asyncio.to_thread(self.gateways[0].kill, number)

    async def detail(self) -> dict[str, Any]:
        """What `readyz` says; nothing if nobody answers."""
        return await self.gateways[0].detail()

    async def ready(self) -> bool:
        return await self.gateways[0].is_ready()

    async def until(self, true: Callable[[], Any]) -> None:
        """true: what it returns is awaited."""
        await until(true, PATIENCE, self.gateways[0].said)

    @asynccontextmanager
    async def load(self, clients: int = 12) -> AsyncIterator[Load]:
        """Questions without an end while the body runs; each client is somebody else."""
        load = Load(wires=[Kept() for _ in range(clients)])
        asking = [asyncio.create_task(self._ask(load, number)) for number in range(clients)]
        try:
            yield load
        finally:
            for task in asking:
                task.cancel()
            ends = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    async def _ask(self, load: Load, number: int) -> None:
        async with self.client(self.token(f"user-{number}"), transport=load.wires[number], shape="none") as client:
            while True:
                try:
                    async for _ in client.chat_stream("Mare Nostrum", max_tokens=12):
                        pass
                except lacre.LacreError as exc:
                    load.failed[type(exc).__name__] += 1
                    await asyncio.sleep(0.02)
                else:
                    load.whole += 1
                    await asyncio.sleep(PAUSE)

    async def close(self) -> None:
        if self.gateways and self.gateways[0].runs:
            await self.kill()
        await super().close()
