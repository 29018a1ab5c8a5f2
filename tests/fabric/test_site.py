"""What `lacre up` writes down anew at each start, and what it leaves as somebody set it."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_backend import settings as worker
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.subjects import DEFAULT_REGION, presence, process_name
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.site import GATEWAY_ID, Site
from lacre_fabric.work.contract import Capacity, FabricUnavailable
from lacre_gateway import settings as gateway
from parts.fabric import LiveFabric, Parties, until

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


@pytest.mark.parametrize("content", ["models = 1", "pool = 'default'"])
def test_a_file_of_another_shape_is_not_overwritten(site: Site, content: str) -> None:
    path = site.worker_settings("default")
    path.write_text(content)
    with pytest.raises(SettingsError, match="damaged"):
        site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    assert path.read_text() == content


async def test_replicas_share_a_credential_and_are_told_apart(tmp_path: Path) -> None:
    """One for all instances of a gateway, and one for all workers of a pool, who may not speak of another."""
    site = Site(tmp_path, {"default": ("m1",), "other": ("m1",)})
    with LiveFabric.running(tmp_path, site.replicated_roles()) as live:
        async with Parties.of(live) as parties:
            await provision(await parties.connect(), site.pools)
            url, of_pool, of_gateway = live.server.url, live.credentials["worker-default"], live.credentials["gateway-g1"]
            for number in (1, 2):
                connecting = NatsWorker.connect(url, of_pool, "default", f"pod-{number}", ["m1"], slots=2)
                worker = await parties.kept(connecting)
            names = [process_name(GATEWAY_ID, number) for number in (0, 15)]
            gateways = [await parties.kept(NatsGateway.connect(url, of_gateway, name)) for name in names]
            seen = ("default", DEFAULT_REGION)
            await until(lambda: all(gateway.capacity().get(seen, Capacity()).free == 4 for gateway in gateways))
            with pytest.raises(FabricUnavailable, match="denies worker-default"):
                async with worker.connection.mapped(confirmed=True):
                    await worker.connection.client.publish(presence("other", DEFAULT_REGION, "pod-1"), b"{}")


def test_what_a_person_wrote_into_the_settings_stays(site: Site) -> None:
    of_gateway, of_worker = site.gateway_settings, site.worker_settings("default")
    own = '[[issuers]]\nissuer = "https://id.example"\naudience = "lacre"\n\n[limits]\nstreams = 5  # of mine\n'
    edited = of_gateway.read_text().replace("drain = 5", "drain = 60 # patience")
    edited = edited.replace('audit = "audit"', 'audit = "/var/audit"')
    of_gateway.write_text(f"# our gateway\n{edited}\n{own}")
    of_worker.write_text(
        "# our worker\n" + of_worker.read_text().replace("drain = 5\n", "").replace('"health"', '"/run/health"')
    )
    texts = of_gateway.read_text(), of_worker.read_text()
    site.write_settings("nats://127.0.0.1:5222", 9321, {"default": TABLES})
    for path, before in zip((of_gateway, of_worker), texts, strict=True):
        moved = before.replace(":4222", ":5222").replace(":8321", ":9321").replace("port = 8321", "port = 9321")
        assert path.read_text() == moved


def test_a_public_url_of_a_persons_own_stays(site: Site) -> None:
    path = site.gateway_settings
    path.write_text(path.read_text().replace("http://127.0.0.1:8321", "https://llm.example"))
    site.write_settings("nats://127.0.0.1:5222", 9321, {"default": TABLES})
    assert tomllib.loads(path.read_text())["public_url"] == "https://llm.example"


@pytest.mark.parametrize("name", ["José", "模型 😀", "two words", "it's", 'q"uo\\te', "new\nline", "del\x7f"])
def test_settings_of_a_state_folder_of_any_name(tmp_path: Path, name: str) -> None:
    site = Site(tmp_path / name, {"default": ("small", "large")})
    site.create()
    for _ in range(2):
        site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    assert gateway.load(site.gateway_settings).nats.credentials == site.credential_file(f"gateway-{GATEWAY_ID}")
    assert worker.load(site.worker_settings("default")).keys == site.keys_folder("default")


def test_several_workers_have_copies_with_their_share(site: Site) -> None:
    path = site.worker_settings("default")
    path.write_text(path.read_text().replace('name = "large"', 'name = "large"\nthreads = 3'))
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES}, ["n1", "n2"])
    found = [worker.load(site.node_settings("default", node)) for node in ("n1", "n2")]
    assert [one.node for one in found] == ["n1", "n2"]
    for name in ("health", "memory"):
        assert len({getattr(one, name) for one in found}) == 2, "each has its own"
    assert all(one.models[1].threads == 3 for one in found)
    assert all(one.models[0].threads == max(1, len(os.sched_getaffinity(0)) // 2) for one in found)
    assert "threads" not in models(site)[0], "the file that a person edits has no guess of ours"


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "{}",
        '{"pools": 1}',
        '{"pools": {"a": "m"}}',
        '{"pools": {"a": ["m"]}, "regions": 5}',
        '{"pools": {"A!": []}}',
    ],
)
def test_a_damaged_site_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "site.json").write_text(content)
    with pytest.raises(SettingsError):
        Site.load(tmp_path)


def test_replicas_and_how_servers_are_trusted_are_kept(site: Site) -> None:
    many = Site(site.folder, {"default": ["small", "large"]}, replicas=3)
    many.save("tls://nats:4222", "https://gateway")
    assert Site.load(site.folder) == many
    path = site.folder / "site.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nats": {"url": "tls://n:4222", "ca": "ca.pem"}}))
    with pytest.raises(SettingsError, match="tls://"):
        Site.load(site.folder).save("nats://other:4222", "https://other")
