"""Gateways and workers as processes: started, asked whether they are ready, ended or killed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx2

from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.site import NODE, Site
from parts.stage.settings import POOL, gateway_settings
from parts.up import ticks
from parts.waiting import PATIENCE, until


def launched(command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """It ends with this process at the latest. What it says is added to the log."""
    with log.open("ab") as output:
        return subprocess.Popen(leashed(command), stdout=output, stderr=output, **{"stdin": subprocess.DEVNULL, **options})


def stopped(process: subprocess.Popen[bytes]) -> int:
    """Its status. In order, if it still runs."""
    if process.poll() is None:
        process.terminate()
    return process.wait(30)


@dataclass
class OwnProcess:
    """A server of ours. inside: what its command becomes if it is to run somewhere else."""

    package: ClassVar[str]

    name: str
    settings: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, inside: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        command = inside(*PYTHON, "-m", self.package, "--settings", str(self.settings))
        self.process = launched(command, self.log)

    @property
    def runs(self) -> bool:
        return hasattr(self, "process") and self.process.poll() is None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-2000:]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def stop(self) -> int:
        return stopped(self.process)


@dataclass
class GatewayProcess(OwnProcess):
    """url: what an application is given."""

    package = "lacre_gateway"

    base_url: str
    url: str

    @classmethod
    def configured(
        cls, site: Site, name: str, nats_urls: Sequence[str], policies: Path, more: str, *, public_url: str = "", drain: int = 5
    ) -> Self:
        """Its settings are written, with a port of its own; it is not started. more: further tables, as TOML. public_url: where
        applications find it, if that is not where it listens.
        """
        port, path = free_port(), site.folder / "gateway" / f"{name}.toml"
        base_url = f"http://127.0.0.1:{port}"
        url = public_url or base_url
        site.credential(f"gateway-{name}")
        lines = f'audit = "audit-{name}"\npolicies = "{policies}"'
        tables, credentials = f"[listen]\nport = {port}\ndrain = {drain}\n{more}", site.credential_file(f"gateway-{name}")
        path.write_text(gateway_settings(name, url, site.root, nats_urls, "grant.pem", credentials, lines, tables))
        return cls(name, path, site.log(name), base_url, site.connection_string(url))

    async def detail(self) -> dict[str, Any]:
        """What `readyz` says; nothing if nobody answers."""
        async with httpx2.AsyncClient(base_url=self.base_url, trust_env=False) as client:
            try:
                detail: dict[str, Any] = (await client.get("/readyz")).json()
            except httpx2.TransportError:
                return {}
            return detail

    async def missing(self) -> dict[str, str]:
        found: dict[str, str] = (await self.detail()).get("missing", {})
        return found

    async def is_ready(self) -> bool:
        assert self.runs, self.said()
        return (await self.detail()).get("status") == "ready"

    async def ready(self, seconds: float = PATIENCE) -> None:
        await until(self.is_ready, seconds, self.said)


@dataclass
class WorkerProcess(OwnProcess):
    """heard: when its presence was heard last, on the monotonic clock."""

    package = "lacre_backend"

    heard: float = 0.0

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.heard = 0.0
        return super().kill(number)

    @property
    def ticks(self) -> int:
        return ticks(self.process.pid)


def worker_settings(site: Site, node: str, upstream: str = "") -> Path:
    """The site's worker settings, for another node; with `upstream`, if there is one, in place of the models."""
    own = site.worker_settings(POOL)
    path = own.with_name(f"{node}.toml")
    text = own.read_text().replace(f'"{NODE}"', f'"{node}"').replace(f"worker-{POOL}-{NODE}", f"worker-{POOL}-{node}")
    if upstream:
        text = text.partition("\n[[models]]")[0] + upstream
    path.touch(0o600)
    path.write_text(text.replace('"manifests"', f'"manifests-{node}"'))
    return path


def busiest(workers: Sequence[WorkerProcess], since: Sequence[int]) -> WorkerProcess:
    """The one that computed the most. since: the ticks of each before."""
    return max(zip(workers, since, strict=True), key=lambda pair: pair[0].ticks - pair[1])[0]
