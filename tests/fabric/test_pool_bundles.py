"""Bundles of two pools: the second one comes while the message server, the gateway and a worker of the first one run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tomlkit

from lacre.errors import SettingsError
from lacre.runtime import file_locks
from lacre.trust.chain import verify
from lacre_backend.settings import load as worker_settings
from lacre_backend.upstream.routes import Route
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import pools
from lacre_fabric.operate.account_reload import AccountFiles, NotTaken
from lacre_fabric.operate.bundles import Bundles
from lacre_fabric.operate.nats_server import executable, free_port
from lacre_fabric.operate.pool_upstreams import UpstreamServer
from lacre_fabric.operate.pools import PoolInUse
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.stores import provision_site
from lacre_fabric.work.contract import FabricUnavailable
from parts.commands import run_lacre
from parts.fabric import Kept, answer, new_work, read
from parts.stage.processes import launched, stopped
from parts.waiting import until

pytestmark = [pytest.mark.slow]

FILES = AccountFiles(wait=5)
WORKER = ("worker.toml", "receipt.pem", "credential.json")


class Bundled(Kept):
    """A site with bundles. Its message server runs from one of them, with the addresses of this machine."""

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        super().__init__(stack)
        self.url = f"nats://127.0.0.1:{free_port()}"
        Bundles(Site(folder, {"default": ("small",)}), self.url, "https://lacre.example").write()
        self.site = Site.load(folder)
        conf = self.conf
        conf.with_name("kept.conf").write_bytes(self.lacre_conf.read_bytes())
        own = f'host: 127.0.0.1\nport: {self.url.rpartition(":")[2]}\njetstream {{store_dir: "{folder / "data" / "nats"}"}}\n'
        conf.write_text(conf.read_text() + own)
        nats = launched([executable(), "-c", str(conf)], folder / "logs" / "nats.log")
        stack.callback(stopped, nats)

    async def start(self) -> None:
        async def published() -> bool:
            with suppress(FabricUnavailable):
                async with Opened(self.site) as connection:
                    await provision_site(self.site, connection)
                    await publish(self.site, connection)
                return True
            return False

        await until(published, 30)

    @property
    def lacre_conf(self) -> Path:
        return self.site.folder / "bundles" / "nats" / "lacre.conf"

    @property
    def conf(self) -> Path:
        return self.lacre_conf.with_name("nats.conf")

    def edit_conf(self, after_ours: str, more: str = "") -> str:
        """Adds lines after the include of Lacre's file, and at the end. Returns the text before."""
        before, ours = self.conf.read_text(), "include ./lacre.conf\n"
        self.conf.write_text(before.replace(ours, ours + after_ours) + more)
        return before

    def bundle(self, name: str) -> tuple[tomlkit.TOMLDocument, Credential]:
        folder = self.site.folder / "bundles" / name
        settings = tomlkit.parse(next(folder.glob("*.toml")).read_text())
        return settings, Credential.load(folder / "credential.json")

    async def gateway(self) -> NatsGateway:
        settings, credential = self.bundle("gateway")
        return await self.kept(NatsGateway.connect(settings["nats"]["url"], credential, settings["gateway"]))

    async def worker(self, pool: str) -> NatsWorker:
        settings, credential = self.bundle(f"worker-{pool}")
        models = [model["name"] for model in settings["models"]]
        return await self.kept(NatsWorker.connect(settings["nats"]["url"], credential, settings["pool"], "n1", models, slots=1))

    async def manifest(self) -> dict[str, list[str]]:
        async with Opened(self.site) as connection:
            document = await connection.manifest()
        assert document is not None
        return {pool: list(one.models) for pool, one in verify(document, self.site.root, time.time()).manifest.pools.items()}


class Opened:
    """The provisioner's connection."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def __aenter__(self) -> Connection:
        self._connection = await Connection.open(self._site.servers, self._site.credential("provisioner"))
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()


@pytest.fixture
async def bundled(tmp_path: Path) -> AsyncIterator[Bundled]:
    async with AsyncExitStack() as stack:
        bundled = Bundled(stack, tmp_path / "state")
        await bundled.start()
        yield bundled


async def passes(gateway: NatsGateway, worker: NatsWorker, pool: str, model: str) -> bool:
    dispatch = await gateway.dispatch(new_work(pool, model))
    await answer(worker)
    return await read(dispatch) == [b"x", b"receipt"]


async def test_bundles_of_two_pools(bundled: Bundled) -> None:
    site, gateway, first = bundled.site, await bundled.gateway(), await bundled.worker("default")
    assert await passes(gateway, first, "default", "small")
    told: list[str] = []
    await pools.add(site, "legal", ["large"], FILES, told.append)
    assert [line.partition(":")[0] for line in told] == ["keys and credentials", "accounts", "queues", "manifest"]
    second = await bundled.worker("legal")
    assert await passes(gateway, second, "legal", "large")
    assert await passes(gateway, first, "default", "small")
    values = json.loads((site.folder / "chart" / "pools.yaml").read_text())
    assert values["pools"] == {"default": {}, "legal": {"models": [{"name": "large", "path": "/models/large.gguf"}]}}

    async with Opened(site) as connection:  # by a process that read the site before
        await publish(site, connection)
    assert await bundled.manifest() == {"default": ["small"], "legal": ["large"]}

    before = bundled.lacre_conf.read_bytes(), site.generations("legal")
    told.clear()
    await pools.add(site, "legal", ["other"], FILES, told.append)  # again, with one more model
    assert [line.partition(":")[0] for line in told] == ["keys and credentials", "queues", "manifest"]
    assert (bundled.lacre_conf.read_bytes(), site.generations("legal")) == before
    assert await bundled.manifest() == {"default": ["small"], "legal": ["large", "other"]}

    used = {key for one in site.generations("legal").live for key in one.ids}
    # Nobody takes it, and it waits for longer than any machine needs for what follows.
    waiting = await gateway.dispatch(new_work("legal", "large"), queue_limit=3600)
    with pytest.raises(PoolInUse, match=r"^the pool legal has live workers \(n1\) and queued requests \(1\): stop its workers"):
        await pools.remove(Site.load(site.folder), "legal", FILES)
    assert await bundled.manifest() == {"default": ["small"], "legal": ["large", "other"]}
    await second.close()
    listed = json.loads(await asyncio.to_thread(lacre, "pool", "list", "--json", f"--state={site.folder}"))
    assert listed["default"]["workers"] == [{"name": "n1", "models": ["small"], "busy": 0, "free": 1}]
    assert (listed["legal"]["workers"], listed["legal"]["queued"]) == ([], 1)
    table = await asyncio.to_thread(lacre, "pool", "list", f"--state={site.folder}")
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["default", "small", "1,", "2", "n1", "0", "of", "1", "0"],
        ["legal", "large,", "other", "1,", "2", "none", "0", "of", "0", "1"],
    ]
    with pytest.raises(PoolInUse, match=r"^the pool legal has queued requests \(1\): stop"):
        await pools.remove(Site.load(site.folder), "legal", FILES)
    with pytest.raises(SettingsError, match="ended with 3"):
        await pools.remove(Site.load(site.folder), "legal", replace(FILES, apply="exit 3"), force=True)
    assert site.receipt_file("legal").exists()
    await pools.remove(Site.load(site.folder), "legal", FILES)  # goes on
    await waiting.cancel()
    assert await bundled.manifest() == {"default": ["small"]}
    assert not (site.folder / "bundles" / "worker-legal").exists()
    assert await passes(gateway, first, "default", "small")
    with pytest.raises(SettingsError, match="unknown pool legal"):
        await pools.remove(Site.load(site.folder), "legal", FILES)
    await pools.add(Site.load(site.folder), "legal", ["large"], FILES)
    assert not used & {key for one in site.generations("legal").live for key in one.ids}, "clients may know the old ids"


async def test_a_failure_leaves_the_pool_out_and_can_be_repeated(bundled: Bundled) -> None:
    site, saved = bundled.site, (bundled.site.folder / "site.json").read_bytes()
    whole = bundled.edit_conf("", more="nonsense {\n")
    with pytest.raises(NotTaken, match=r"^lacre refuses the accounts \(.*Bring .*lacre\.conf to every NATS server"):
        await pools.add(site, "legal", ["large"], replace(FILES, wait=1))
    bundled.conf.write_text(whole)
    with pytest.raises(SettingsError, match="ended with 3: no route"):
        await pools.add(site, "legal", ["large"], replace(FILES, apply="echo no route; exit 3"))
    bundled.edit_conf("include ./kept.conf\n")  # the server does not see what is written
    lost = site.folder / "accounts.json"
    with pytest.raises(NotTaken, match=f"the old accounts are still those of lacre. Bring {lost}"):
        await pools.add(site, "legal", ["large"], replace(FILES, named=(lost,), wait=1))
    bundled.conf.write_text(whole)
    assert (site.folder / "site.json").read_bytes() == saved
    assert await bundled.manifest() == {"default": ["small"]}
    await pools.add(site, "legal", ["large"], FILES)
    assert await passes(await bundled.gateway(), await bundled.worker("legal"), "legal", "large")


def bundles_of_one_pool(folder: Path, *names: str) -> Site:
    wanted = dict.fromkeys(names or ("default",), ("small",))
    Bundles(Site(folder, wanted), "nats://nats.invalid:4222", "https://lacre.example").write()
    return Site.load(folder)


@pytest.mark.parametrize(
    ("pool", "models", "origin", "text"),
    [
        ("Legal", ["large"], "", "a pool name has 1 to 63 of a-z, 0-9"),
        ("", ["large"], "", "a pool name has"),
        ("a.b", ["large"], "", "a pool name has"),
        ("*", ["large"], "", "a pool name has"),
        ("../x", ["large"], "", "a pool name has"),
        ("l" * 64, ["large"], "", "a pool name has 1 to 63"),
        ("default-keys", ["large"], "", "default-keys is the Secret with its keys; choose another name"),
        ("default-n1", ["large"], "", "default-n1 is a worker's credential"),
        ("legal", [], "", "name a model of the new pool legal"),
        ("legal", ["two words"], "", "is not a valid model id"),
        ("default", [], "", "the pool default exists, with small: name a model to add"),
        ("default", ["large"], "http://127.0.0.1:8000", r"the pool default exists: change its \[upstream\]"),
        ("legal", ["large"], "127.0.0.1:8000", "write scheme, host and port alone"),
        ("legal", ["large"], "http://127.0.0.1:8000/v1", "write scheme, host and port alone"),
        ("legal", ["large"], "http://me:secret@127.0.0.1", "write scheme, host and port alone"),
        ("legal", ["large"], "http://127.0.0.1:999999", "write scheme, host and port alone"),
        ("legal", ["large"], "http://vllm.example:8000", "prompts would cross a network"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_what_is_no_pool_makes_nothing(
    tmp_path: Path, pool: str, models: list[str], origin: str, text: str, offline: bool
) -> None:
    site = bundles_of_one_pool(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError, match=text):
        asyncio.run(
            (pools.prepare if offline else pools.add)(
                site, pool, models, FILES, upstream=UpstreamServer(origin) if origin else None
            )
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pool_named_as_a_file_of_the_state(tmp_path: Path) -> None:
    site = bundles_of_one_pool(tmp_path)
    for name in ("lock", "keys", "nats", "default_n1"):
        site = asyncio.run(pools.prepare(site, name, ["large"], FILES))
    assert set(Site.load(tmp_path).pools) == {"default", "lock", "keys", "nats", "default_n1"}
    assert site.receipt_file("lock").exists()


def test_an_upstream_pool(tmp_path: Path) -> None:
    """Its workers get the settings that the worker itself accepts. A person's changes stay."""
    site, server = bundles_of_one_pool(tmp_path), UpstreamServer("http://127.0.0.1:8000", ("POST /v1/embeddings",))
    asyncio.run(pools.prepare(site, "vllm", ["qwen"], FILES, upstream=server))
    path = tmp_path / "bundles" / "worker-vllm" / "worker.toml"
    path.write_text(path.read_text().replace('origin = "http://127.0.0.1:8000"', 'origin = "http://127.0.0.1:9000"'))
    site = asyncio.run(pools.prepare(Site.load(tmp_path), "vllm", ["qwen", "other"], FILES))
    settings = worker_settings(path)
    assert settings.upstream is not None
    assert settings.upstream.origin == "http://127.0.0.1:9000"
    assert [(one.name, one.allow) for one in settings.upstream.models] == [
        (name, (Route.parse("POST /v1/embeddings"),)) for name in ("qwen", "other")
    ]
    assert not settings.models
    values = json.loads((tmp_path / "chart" / "pools.yaml").read_text())["pools"]
    assert values == {"default": {}, "vllm": {"upstream": server.table(["qwen", "other"])}}
    asyncio.run(pools.withdraw(site, "vllm", FILES))
    assert "upstreams" not in json.loads((tmp_path / "site.json").read_text())


async def test_the_only_pool_stays_and_one_command_at_a_time(tmp_path: Path) -> None:
    Bundles(Site(tmp_path, {"default": ("small",)}), "nats://nats.invalid:4222", "https://lacre.example").write()
    site = Site.load(tmp_path)
    with pytest.raises(SettingsError, match="default is the only pool"):
        await pools.remove(site, "default", FILES)
    with file_locks.held(tmp_path / "pools" / ".lock", ""), pytest.raises(SettingsError, match="another `lacre pool` command"):
        await pools.add(site, "legal", ["large"], FILES)


async def test_a_state_of_lacre_up_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, {"default": ("small",)})
    site.create()
    site.save("nats://127.0.0.1:4222", "http://127.0.0.1:8321")
    with pytest.raises(SettingsError, match="`lacre up` starts the workers of one pool"):
        await pools.add(site, "legal", ["large"], FILES)


async def test_a_command_that_stays_is_ended_with_its_children(tmp_path: Path) -> None:
    """A child that is left holds the pipe, and may still write files when the next try has begun."""
    files = AccountFiles(apply=f"sleep 60 & echo $! > {tmp_path}/child; wait", apply_limit=1.0)
    async with asyncio.timeout(20):
        with pytest.raises(SettingsError, match="--apply: the command did not end within 1 s"):
            await files.applied()
    child = int((tmp_path / "child").read_text())
    await until(lambda: not _runs(child))


def _runs(process: int) -> bool:
    """Whether it is there, and not merely unread by its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_files_alone(tmp_path: Path) -> None:
    bundles_of_one_pool(tmp_path)
    for _ in range(2):
        said = lacre("pool", "add", "legal", "--model=large", "--offline", f"--state={tmp_path}")
        assert "restart the NATS servers one after the other, then run `lacre manifest publish`" in said
    assert "POOL_legal" in (tmp_path / "bundles" / "nats" / "lacre.conf").read_text()
    assert {path.name for path in (tmp_path / "bundles" / "worker-legal").iterdir()} == set(WORKER)
    listed = json.loads(lacre("pool", "list", "--json", f"--state={tmp_path}"))
    assert listed["legal"] == {"models": ["large"], "keys": [1, 2], "workers": None, "queued": None}
    with pytest.raises(subprocess.CalledProcessError) as unknown:
        lacre("pool", "remove", "nowhere", "--offline", f"--state={tmp_path}")
    assert "unknown pool nowhere" in unknown.value.stderr
    assert "destroy" not in unknown.value.stdout, "it asks only about a pool that is there"
    lacre("pool", "remove", "legal", "--yes", "--offline", f"--state={tmp_path}")
    assert "POOL_legal" not in (tmp_path / "bundles" / "nats" / "lacre.conf").read_text()
    assert not list((tmp_path / "pools" / "legal" / "keys").glob("*"))
    assert set(json.loads((tmp_path / "site.json").read_text())["pools"]) == {"default"}


def lacre(*arguments: str) -> str:
    done = run_lacre(*arguments)
    done.check_returncode()
    return done.stdout
