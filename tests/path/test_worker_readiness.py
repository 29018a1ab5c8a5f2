"""A worker that cannot work, on a real message server: not announced, not ready, and named everywhere that one would look."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.msg import Msg

from lacre.jose.jws import b64u, raw_public_key
from lacre.runtime import tasks
from lacre_backend import serve
from lacre_backend.commands.check import _examine, examine
from lacre_backend.health import READY
from lacre_backend.settings import WorkerSettings, load
from lacre_backend.upstream.settings import UpstreamCredential
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.nats.provisioning import publish_manifest
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from lacre_gateway.doctor import fabric as doctor
from lacre_gateway.doctor.findings import Findings, State
from lacre_gateway.settings import load as load_gateway
from parts.stage import LiveStage, until

POOLS = {"default": ("m1",), "other": ("m1",)}


@dataclass
class Ready:
    """A site with a message server, and what the worker of the pool `default` says of itself."""

    site: Site
    port: int  # where its upstream is looked for
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> WorkerSettings:
        """Of a worker that could work."""
        path = self.site.worker_settings("default")
        text = path.read_text().partition("[[models]]")[0]
        upstream = (
            f'[upstream]\norigin = "http://127.0.0.1:{self.port}"\n[[upstream.models]]\nname = "m1"\nallow = ["POST /x"]\n'
        )
        (path.parent / "upstream.toml").write_text(text + upstream)
        return load(path.parent / "upstream.toml")

    def with_origins(self, ports: Sequence[int]) -> WorkerSettings:
        """With an upstream of several servers."""
        settings = self.settings
        assert settings.upstream is not None
        origins = tuple(f"http://127.0.0.1:{port}" for port in ports)
        return settings.model_copy(
            update={"upstream": settings.upstream.model_copy(update={"origin": None, "origins": origins})}
        )

    async def hear(self, message: Msg) -> None:
        if message.subject == subjects.presence("default", subjects.DEFAULT_REGION, NODE):
            self.said = json.loads(message.data)

    async def until(self, true: Callable[[], bool]) -> None:
        await until(true, 15, lambda: self.said)

    @asynccontextmanager
    async def running(self, settings: WorkerSettings) -> AsyncIterator[None]:
        self.said = {}
        task = tasks.spawn("worker", serve._serve(settings))
        try:
            yield
        finally:
            assert not task.done(), task.exception()
            await tasks.end(task, limit=15)

    async def doctor(self, check: str = "workers default") -> tuple[State, str]:
        findings = Findings()
        await doctor.check(load_gateway(self.site.gateway_settings), findings)
        [found] = [finding for finding in findings.found if finding.check == check]
        return found.state, found.detail


@asynccontextmanager
async def listening(port: int) -> AsyncIterator[None]:
    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", port):
        yield


@pytest.fixture
async def ready(tmp_path: Path) -> AsyncIterator[Ready]:
    async with LiveStage(tmp_path, POOLS) as live:
        await live.start_fabric()
        live.site.write_settings(live.server.url, free_port(), {pool: [{"name": "m1"}] for pool in POOLS})
        ready = Ready(live.site, free_port())
        connection = await live.connect()
        await connection.client.subscribe("presence.>", cb=ready.hear)
        yield ready
        await connection.close()


def of_another_pool(site: Site, name: str) -> dict[str, object]:
    return {name: getattr(load(site.worker_settings("other")), name)}


def of_another_model(settings: WorkerSettings) -> dict[str, object]:
    assert settings.upstream is not None
    models = (settings.upstream.models[0].model_copy(update={"name": "m9"}),)
    return {"upstream": settings.upstream.model_copy(update={"models": models})}


@pytest.mark.parametrize(
    ("broken", "kind", "said"),
    [
        (lambda *_: {"trust": b64u(raw_public_key(Ed25519PrivateKey.generate()))}, "trust", "pinned root"),
        (lambda site, _: of_another_pool(site, "receipt_key"), "receipt_key", "it is pool other's"),
        (lambda site, _: of_another_pool(site, "keys"), "keys", "none of the keys"),
        (lambda _, settings: of_another_model(settings), "model", "m9"),
    ],
)
async def test_a_worker_with_something_wrong_is_not_announced(
    ready: Ready, tmp_path: Path, broken: Callable[[Site, WorkerSettings], dict[str, object]], kind: str, said: str
) -> None:
    health = tmp_path / "health"
    settings = ready.settings.model_copy(update={"health": health, **broken(ready.site, ready.settings)})
    async with listening(ready.port), ready.running(settings):
        await ready.until(lambda: ready.said.get("wrong") == [kind] and health.exists() and said in health.read_text())
        assert ready.said["models"] == []
        checked = await _examine(settings)
        assert [reason.kind for reason in checked] == [kind]
        assert said in checked[0].detail


async def test_the_doctor_compares_the_fabric_with_what_the_gateway_remembers(ready: Ready) -> None:
    connection = await Connection.open(ready.site.servers, ready.site.credential("provisioner"))
    settings = load_gateway(ready.site.gateway_settings)
    older = await connection.manifest()
    assert await ready.doctor("memory") == (State.OK, "g1 has seen no newer manifest")
    await publish(ready.site, connection)
    await ManifestFeed(connection.manifest, settings.root, memory=memory_in(settings.memory)).refresh()
    assert (await ready.doctor("memory"))[0] is State.OK
    await publish_manifest(connection, older or b"")
    assert await ready.doctor("memory") == (State.FAILED, "g1 has seen version 2, and ignores version 1 of the fabric")
    await connection.close()


@pytest.mark.slow
async def test_a_good_worker_is_announced_and_one_whose_upstream_goes_is_not(ready: Ready, tmp_path: Path) -> None:
    health = tmp_path / "health"
    settings = ready.settings.model_copy(update={"health": health})
    async with ready.running(settings):
        await ready.until(lambda: ready.said.get("wrong") == ["upstream"])
        assert (ready.said["models"], await ready.doctor()) == (
            [],
            (State.FAILED, f"none is ready: {NODE} (upstream)"),
        )
        async with listening(ready.port):
            await ready.until(lambda: ready.said["models"] == ["m1"])
            assert ready.said["wrong"] == []
            await ready.until(lambda: health.read_text().splitlines()[0] == READY)
            url = f"http://127.0.0.1:{ready.port}"
            assert health.read_text().splitlines()[1] == f"upstream {url} up running=0 sent=0 unreachable=0 failed=0"
        await ready.until(lambda: ready.said["models"] == [])
        assert ready.said["wrong"] == ["upstream"]


@pytest.mark.slow
async def test_one_of_several_servers_is_enough(ready: Ready, tmp_path: Path) -> None:
    other = free_port()
    ports, health = (ready.port, other), tmp_path / "health"
    settings = ready.with_origins(ports).model_copy(update={"health": health})
    async with ready.running(settings):
        await ready.until(lambda: ready.said.get("wrong") == ["upstream"])
        async with listening(other):
            await ready.until(lambda: ready.said["models"] == ["m1"])
            [down] = await _examine(settings)
            assert down.kind == "upstream" and str(ready.port) in down.detail
            await ready.until(lambda: [line.split()[2] for line in health.read_text().splitlines()[1:]] == ["down", "up"])
            async with listening(ready.port):
                await ready.until(lambda: [line.split()[2] for line in health.read_text().splitlines()[1:]] == ["up", "up"])
        await ready.until(lambda: ready.said["models"] == [])
    assert [str(port) in reason.detail for port, reason in zip(ports, await _examine(settings), strict=True)] == [True, True]


async def test_the_worker_s_own_check_names_a_credential_that_it_may_not_read(ready: Ready, tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    key.touch(0o644)
    credential = UpstreamCredential(scheme="Bearer", file=key)
    assert ready.settings.upstream is not None
    upstream = ready.settings.upstream.model_copy(update={"credentials": (credential,)})
    async with listening(ready.port):
        [reason] = await _examine(ready.settings.model_copy(update={"upstream": upstream}))
    assert reason.kind == "upstream" and str(key) in reason.detail


async def test_the_worker_s_own_check_names_what_is_wrong_before_it_runs(ready: Ready) -> None:
    async with listening(ready.port):
        assert await _examine(ready.settings) == []
    assert [reason.kind for reason in await _examine(ready.settings)] == ["upstream"]
    path = ready.site.worker_settings("default").parent / "broken.toml"
    path.write_text("pool = 1\n")
    for file in (path, path.with_name("missing.toml")):
        assert [reason.kind for reason in await asyncio.to_thread(examine, file)] == ["settings"]
