"""What `lacre up` writes down anew at each start, and what it leaves as somebody set it."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.connection import Connection
from lacre_fabric.nats_gateway import NatsGateway
from lacre_fabric.nats_worker import NatsWorker
from lacre_fabric.provisioning import provision
from lacre_fabric.server import Server, free_port
from lacre_fabric.site import GATEWAY_ID, Site
from lacre_fabric.subjects import DEFAULT_REGION, presence, process_name
from lacre_fabric.work import Capacity, FabricUnavailable

TABLES = [{"name": "small", "path": "/models/small.gguf"}, {"name": "large", "path": "/models/large.gguf"}]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small", "large")})
    site.create()
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    return site


def models(site: Site) -> list[dict[str, object]]:
    return tomllib.loads(site.worker_settings("default").read_text())["models"]  # type: ignore[no-any-return]


def test_what_was_set_for_a_model_stays(site: Site) -> None:
    path = site.worker_settings("default")
    path.write_text(path.read_text().replace('name = "large"', 'name = "large"\nthreads = 3\nflash = true'))
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": list(reversed(TABLES))})
    assert models(site) == [{**TABLES[1], "threads": 3, "flash": True}, TABLES[0]]
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": [{"name": "large", "path": "/models/other.gguf"}]})
    assert models(site) == [{"name": "large", "path": "/models/other.gguf"}], "another file is another model"


@pytest.mark.parametrize("content", ["models = 1", "[[models]", "pool = 'default'"])
def test_a_damaged_file_is_not_overwritten(site: Site, content: str) -> None:
    path = site.worker_settings("default")
    path.write_text(content)
    with pytest.raises(SettingsError, match="damaged"):
        site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    assert path.read_text() == content


def test_replicas_are_kept(site: Site) -> None:
    many = Site(site.folder, {"default": ["small", "large"]}, replicas=3)
    many.save("tls://nats:4222", "https://gateway")
    assert Site.load(site.folder) == many


async def test_replicas_share_a_credential_and_are_told_apart(tmp_path: Path) -> None:
    """One for all instances of a gateway, and one for all workers of a pool, who may not speak of another."""
    site = Site(tmp_path, {"default": ("m1",), "other": ("m1",)})
    server = Server(tmp_path / "nats", free_port())
    server.configure(site.replicated_roles())
    process = server.start(tmp_path / "nats.log")
    try:
        connection = await Connection.open(server.url, site.credential("provisioner"))
        await provision(connection, site.pools)
        credential = site.credential("worker-default")
        workers = [await NatsWorker.connect(server.url, credential, "default", f"pod-{n}", ["m1"], slots=2) for n in (1, 2)]
        gateways = [
            await NatsGateway.connect(server.url, site.credential(f"gateway-{GATEWAY_ID}"), process_name(GATEWAY_ID, number))
            for number in (0, 15)
        ]
        async with asyncio.timeout(5):
            while any(gateway.capacity().get(("default", DEFAULT_REGION), Capacity()).free != 4 for gateway in gateways):
                await asyncio.sleep(0.05)
        with pytest.raises(FabricUnavailable, match="denies worker-default"):
            async with workers[0].connection.mapped(confirmed=True):
                await workers[0].connection.client.publish(presence("other", DEFAULT_REGION, "pod-1"), b"{}")
        for one in (*workers, *gateways, connection):
            await one.close()
    finally:
        process.terminate()
        process.wait(10)
