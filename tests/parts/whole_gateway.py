"""A whole gateway as it runs in earnest: a process of its own, on a real nats-server, with a real node whose engine echoes.

The node lives in the test's process. What comes and goes is the gateway: it is killed, started again, and starved of disk.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

import lacre
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import raw_public_key
from lacre_backend.api.app import create_app
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats.roles import Role
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import free_port
from parts.echo_engine import EchoEngine
from parts.live_site import LiveSite

POOL, MODEL = "default", "echo"
PATIENCE = 60.0  # seconds; the machine may be busy
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
    failed: dict[str, int] = field(default_factory=dict)
    wires: list[Kept] = field(default_factory=list)

    @property
    def proofs(self) -> list[AuditProof]:
        return [proof for wire in self.wires for proof in wire.proofs]

    def fail(self, error: Exception) -> None:
        self.failed[type(error).__name__] = self.failed.get(type(error).__name__, 0) + 1


class WholeGateway:
    """site: its state folder. policies: its rule set, where it is not the one that ships. audit: the log's folder."""

    def __init__(
        self, folder: Path, *, policies: Path | None = None, audit: Path | None = None, pools: Sequence[str] = (POOL,)
    ) -> None:
        self.live = LiveSite(folder, dict.fromkeys(pools, (MODEL,)))
        self.site = self.live.site
        self.audit = audit or self.site.folder / "gateway" / "audit"
        self.log = folder / "gateway.log"
        self._policies = policies
        self._port = free_port()
        self._http = httpx2.AsyncClient(base_url=self.base_url)
        self.live.stack.push_async_callback(self._http.aclose)
        self.process: subprocess.Popen[bytes] | None = None

    def more_roles(self) -> list[Role]:
        """Beside the site's own."""
        return []

    @property
    def nats(self) -> subprocess.Popen[bytes]:
        return self.live.nats

    @property
    def nats_port(self) -> int:
        return self.live.server.port

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def key(self) -> bytes:
        """The public key of grants and checkpoints."""
        return raw_public_key(read_ed25519(self.site.folder / "gateway" / "grant.pem"))

    async def set_up(self) -> None:
        """Everything but the gateway."""
        live, site = self.live, self.site
        await live.start(more=self.more_roles())
        site.write_settings(live.server.url, self._port, {pool: [{"name": MODEL}] for pool in site.pools})
        text = site.gateway_settings.read_text().replace('audit = "audit"', f'audit = "{self.audit}"')
        policies = "" if self._policies is None else f'policies = "{self._policies}"\n'
        site.gateway_settings.write_text(policies + text)
        for pool in site.pools:
            engine = EchoEngine(name=MODEL, delay=0.003)
            live.stack.callback(engine.close)
            await live.node(create_app([engine]), pool, slots=SLOTS)

    async def start(self) -> None:
        """Returns when it is ready."""
        command = leashed([*PYTHON, "-m", "lacre_gateway", "--settings", str(self.site.gateway_settings)])
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # noqa: ASYNC220
        await self.until(self.ready)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = await asyncio.to_thread(self.process.wait, PATIENCE)
        self.process = None
        return status

    async def detail(self) -> dict[str, Any]:
        """What `readyz` says; nothing where nobody answers."""
        try:
            detail: dict[str, Any] = (await self._http.get("/readyz")).json()
        except httpx2.TransportError:
            return {}
        return detail

    async def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return (await self.detail()).get("status") == "ready"

    async def until(self, true: Callable[[], Any]) -> None:
        """true: returns an awaitable of a truth value."""
        deadline = time.monotonic() + PATIENCE
        while not await true():
            assert time.monotonic() < deadline, (await self.detail(), self.log.read_text()[-2000:])
            await asyncio.sleep(0.02)

    def token(self, subject: str, scopes: Sequence[str] = (), groups: Sequence[str] = ()) -> str:
        return self.live.token(subject, scopes=scopes, groups=groups)

    def client(self, wire: Kept, token: str) -> lacre.AsyncClient:
        """One that neither asks again nor resumes: each failure is seen."""
        url = self.site.connection_string(self.base_url)
        return lacre.AsyncClient(
            url, token=token, memory=lacre.VersionMemory(), transport=wire, shape="none", retries=0, resume=0
        )

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
        async with self.client(load.wires[number], self.token(f"user-{number}")) as client:
            while True:
                try:
                    async for _ in client.chat_stream("Mare Nostrum", max_tokens=12):
                        pass
                except lacre.LacreError as exc:
                    load.fail(exc)
                    await asyncio.sleep(0.02)
                else:
                    load.whole += 1
                    await asyncio.sleep(PAUSE)

    async def close(self) -> None:
        if self.process is not None:
            await self.kill()
        await self.live.close()


@asynccontextmanager
async def whole_gateway(folder: Path, **options: Any) -> AsyncIterator[WholeGateway]:
    """Set up, and not started yet."""
    gateway = WholeGateway(folder, **options)
    try:
        await gateway.set_up()
        yield gateway
    finally:
        await gateway.close()
