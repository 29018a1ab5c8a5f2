"""A deployment for other people's programs: a worker whose engine follows scripts, and `lacre proxy` before the gateway."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from lacre_backend.engine.protocol import FinishReason
from lacre_fabric.operate.leash import PYTHON
from lacre_fabric.operate.site import NODE
from parts.stage.live import LiveStage
from parts.stage.processes import WorkerProcess, launched
from parts.stage.settings import POOL, own_issuer
from parts.up import LACRE

SCRIPTED = "scripted"
_TESTS = Path(__file__).resolve().parents[2]
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running `lacre proxy`. base_url: ends in `/v1`."""

    base_url: str
    key: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2].partition("/")[0])

    @property
    def origin(self) -> str:
        return self.base_url.removesuffix("/v1")

    @classmethod
    @contextmanager
    def running(cls, url: str, token: str, home: Path) -> Iterator[Self]:
        """home: of what it remembers. The body runs while it listens."""
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"LACRE_URL": url, "LACRE_TOKEN": token, "XDG_STATE_HOME": str(home)}
        command = [*LACRE, "proxy", "--port", "0", "--json"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            told = json.loads(line)
            yield cls(told["base_url"], told["api_key"], process)
        finally:
            process.terminate()
            process.communicate(timeout=30)

    def environment(self) -> dict[str, str]:
        """Of a program that uses it."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        openai = {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.key}
        return kept | openai | {"ANTHROPIC_BASE_URL": self.origin, "ANTHROPIC_API_KEY": self.key}


@dataclass
class ScriptedWorker(WorkerProcess):
    """The process of `parts/scripted_worker.py`. served: the site's folder, and the address of its message server."""

    served: tuple[str, ...] = ()

    def start(self, inside: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        command = inside(*PYTHON, "-m", "parts.scripted_worker", *self.served)
        self.process = launched(command, self.log, env=os.environ | {"PYTHONPATH": str(_TESTS)})

    def begun(self) -> int:
        """How many tasks began."""
        return self.log.read_text().splitlines().count("begun")

    def asked(self) -> list[dict[str, Any]]:
        """What it was asked, as `path` and `body`, if `LACRE_RECORD` was set when it started."""
        kept = Path(self.served[0]).with_name("asked")
        return [json.loads(path.read_text()) for path in sorted(kept.glob("*.json"))]

    def ends(self) -> Counter[str]:
        """How many tasks ended for each reason."""
        return Counter(line for line in self.log.read_text().splitlines() if line in get_args(FinishReason))


class ScriptedStage(LiveStage):
    """A `LiveStage` whose one worker is a `ScriptedWorker`. proxy: in front of its gateway."""

    scripted: ScriptedWorker
    proxy: Proxy

    @classmethod
    @asynccontextmanager
    async def speaking(cls, folder: Path) -> AsyncIterator[Self]:
        async with cls(folder, {POOL: (SCRIPTED,)}) as live:
            await live.start_fabric()
            live.write_settings({"name": SCRIPTED})
            settings, log = live.site.worker_settings(POOL), live.site.log(NODE)
            live.scripted = ScriptedWorker(NODE, settings, log, served=(str(live.site.folder), live.server.url))
            live.workers.append(live.scripted)
            await live.start_workers()
            live.gateway(own_issuer(live.site), drain=2)
            await live.start_gateways()
            await live.heard()
            with Proxy.running(live.gateways[0].url, live.token("client"), folder / "xdg") as live.proxy:
                yield live
