"""What a site's settings and bundles are written with, anew each time, and what stays as somebody set it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre.trust.chain import ConnectionString
from lacre_backend import settings as worker
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.subjects import DEFAULT_REGION, presence, process_name
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.bundles import Bundles
from lacre_fabric.operate.nats_server import executable, free_port
from lacre_fabric.operate.site import GATEWAY_ID, Site
from lacre_fabric.work.contract import Capacity, FabricUnavailable
from lacre_gateway import settings as gateway
from parts.commands import run_lacre
from parts.fabric import LiveFabric, Parties
from parts.waiting import until

TABLES = [{"name": "small", "path": "/models/small.gguf"}, {"name": "large", "path": "/models/large.gguf"}]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small", "large")})
    site.create()
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    return site


def tables(site: Site) -> list[dict[str, object]]:
    return tomllib.loads(site.worker_settings("default").read_text())["models"]  # type: ignore[no-any-return]


def test_what_was_set_for_a_model_stays(site: Site) -> None:
    path = site.worker_settings("default")
    path.write_text(path.read_text().replace('name = "large"', 'name = "large"\nthreads = 3\nflash = true'))
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": list(reversed(TABLES))})
    assert tables(site) == [{**TABLES[1], "threads": 3, "flash": True}, TABLES[0]]
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": [{"name": "large", "path": "/models/other.gguf"}]})
    assert tables(site) == [{"name": "large", "path": "/models/other.gguf"}], "another file is another model"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, None])
def test_others_have_no_way_into_the_folder(tmp_path: Path, mode: int | None) -> None:
    """Also if somebody made it before, with a plain `mkdir`."""
    folder = tmp_path / "state"
    if mode is not None:
        folder.mkdir()
        folder.chmod(mode)
    before = os.umask(0)
    try:
        Site(folder, {"default": ("small",)}).create()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


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
    of_gateway.write_text(own_url := texts[0].replace("http://127.0.0.1:8321", "https://llm.example"))
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    assert of_gateway.read_text() == own_url, "a public URL of a person's own"


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
    assert "threads" not in tables(site)[0], "the file that a person edits has no guess of ours"


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


# Bundles: what each process of a deployment gets, enough to run, and nothing that is another's.


COMMAND = ["fabric", "bundles", "--nats=nats://nats:4222", "--public-url=http://127.0.0.1:8321"]
BUNDLES = {
    "nats": {"nats.conf", "lacre.conf"},
    "gateway": {"gateway.toml", "grant.pem", "credential.json", "issuer.jwks"},
    "worker-default": {"worker.toml", "receipt.pem", "credential.json"},
}


def bundles(state: Path, *options: str) -> str:
    done = run_lacre(*COMMAND, f"--state={state}", *options)
    done.check_returncode()
    return done.stdout.strip()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    bundles(tmp_path / "state", "--model=small")
    return tmp_path / "state"


def files(state: Path, bundle: str = "") -> list[Path]:
    return list((state / "bundles" / bundle).iterdir())


def worker_toml(state: Path, name: str = "worker-default") -> Path:
    return state / "bundles" / name / "worker.toml"


def models(state: Path) -> list[str]:
    return [model.name for model in worker.load(worker_toml(state)).models]


def site_of(state: Path) -> dict[str, object]:
    return json.loads((state / "site.json").read_text())  # type: ignore[no-any-return]


def append(path: Path, text: str) -> str:
    path.write_text(path.read_text() + text)
    return path.read_text()


def test_a_bundle_holds_what_it_should_and_no_other_ones_secrets(state: Path) -> None:
    for name, wanted in BUNDLES.items():
        assert {path.name for path in files(state, name)} == wanted
        assert {path.stat().st_mode & 0o777 for path in files(state, name)} == {0o600}
    content = {name: b"".join(path.read_bytes() for path in files(state, name)) for name in BUNDLES}
    passwords = {path.stem: json.loads(path.read_text())["password"].encode() for path in (state / "fabric").iterdir()}
    assert all(password in content["nats"] for password in passwords.values())
    for name, own in (("gateway", "gateway-g1"), ("worker-default", "worker-default")):
        assert [who for who, password in passwords.items() if password in content[name]] == [own]
    for name in ("root", "signer", "issuer"):
        key = (state / f"{name}.pem").read_bytes().splitlines()[1]
        assert not [bundle for bundle, text in content.items() if key in text]


def test_settings_hold(state: Path) -> None:
    served = gateway.load(state / "bundles" / "gateway" / "gateway.toml")
    assert served.audit.is_absolute()
    node = worker.load(worker_toml(state))
    assert node.models[0].path == Path("/models/small.gguf")
    assert all(path.exists() for path in (served.signing_key, served.nats.credentials, node.receipt_key))
    assert node.health is not None
    check = [executable(), "-t", "-c", str(state / "bundles" / "nats" / "nats.conf")]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0


# Again: nothing that the state knows goes because it was not named again.


def test_again_keeps_the_keys_and_the_pools_own_models(state: Path) -> None:
    before = {path: path.read_bytes() for path in state.rglob("*.pem")}
    url = bundles(state)
    assert {path: path.read_bytes() for path in state.rglob("*.pem")} == before
    assert ConnectionString.parse(url).root == Site.load(state).root
    assert site_of(state)["pools"] == {"default": ["small"]}


def test_another_pool_is_added(state: Path) -> None:
    bundles(state, "--pool=legal", "--model=large")
    bundles(state, "--model=other")
    assert site_of(state)["pools"] == {"default": ["small", "other"], "legal": ["large"]}
    assert {path.name for path in files(state)} == {*BUNDLES, "worker-legal"}
    assert models(state) == ["small", "other"]
    accounts = (state / "bundles" / "nats" / "lacre.conf").read_text()
    assert "POOL_legal" in accounts and "POOL_default" in accounts


def test_replicas_regions_and_how_servers_are_trusted_stay(tmp_path: Path) -> None:
    site = Site(tmp_path, {"legal": ["m1"], "default": ["m2"]}, replicas=3, regions=("eu", "us"))
    site.create()
    site.save("tls://n:4222", "https://g")
    path = tmp_path / "site.json"
    path.write_text(json.dumps({**site_of(tmp_path), "nats": {"url": "tls://n:4222", "ca": "ca.pem"}, "note": 1}))
    Bundles(Site(tmp_path, {"default": ("m3",)}), "tls://other:4222", "https://other").write()
    assert site_of(tmp_path) == {
        "pools": {"legal": ["m1"], "default": ["m2", "m3"]},
        "replicas": 3,
        "regions": ["eu", "us"],
        "nats": {"url": "tls://other:4222", "ca": "ca.pem"},
        "gateway": "https://other",
        "note": 1,
    }
    names = {f"{kind}-{region}" for kind in ("gateway", "worker-legal", "worker-default") for region in ("eu", "us")}
    assert {path.name for path in files(tmp_path)} == {"nats", *names}
    assert worker.load(worker_toml(tmp_path, "worker-legal-us")).nats.region == "us"


def test_what_a_person_wrote_stays(state: Path) -> None:
    of_gateway, of_worker = state / "bundles" / "gateway" / "gateway.toml", worker_toml(state)
    of_gateway.write_text("# ours\n" + of_gateway.read_text().replace("drain = 25", "drain = 50 # long"))
    of_worker.write_text(of_worker.read_text().replace("/models/small.gguf", "/models/renamed.gguf") + "slots = 3 # few\n")
    before = of_gateway.read_text(), of_worker.read_text()
    bundles(state, "--model=small")
    assert (of_gateway.read_text(), of_worker.read_text()) == before


def test_a_model_that_a_person_wrote_is_not_lost(state: Path) -> None:
    """The site does not know it, so no manifest names it, and no caller could reach it."""
    append(worker_toml(state), '\n[[models]]\nname = "own"\npath = "/models/own-q4.gguf"\n')
    bundles(state)
    assert models(state) == ["small"]
    bundles(state, "--model=own")
    served = worker.load(worker_toml(state)).models
    assert [str(model.path) for model in served] == ["/models/small.gguf", "/models/own-q4.gguf"]


def test_a_model_that_was_taken_out_and_comes_back(state: Path) -> None:
    bundles(state, "--model=other")
    path = worker_toml(state)
    path.write_text(path.read_text().replace('name = "small"', 'name = "small"\nslots = 3'))
    (state / "site.json").write_text(json.dumps({**site_of(state), "pools": {"default": ["new"]}}))
    bundles(state)
    aside = tomllib.loads(path.with_name("set-aside.toml").read_text())["models"]
    assert [model["name"] for model in aside] == ["small"], "nobody wrote anything of the other"
    bundles(state, "--model=small")
    assert [(model.name, model.slots) for model in worker.load(path).models][1] == ("small", 3)


@pytest.mark.parametrize(
    ("nats", "public_url", "said"),
    [
        ("nats", "https://g", "--nats: url: write an address such as nats://"),
        ("http://n:4222", "https://g", "--nats"),
        ("nats://n:99999", "https://g", "--nats"),
        ("nats://u:p@n:4222", "https://g", "take user and password out"),
        ("nats://n:4222", "g", "--public-url g: write an address such as https://"),
        ("nats://n:4222", "ftp://g", "--public-url"),
        ("nats://n:4222", "https://", "--public-url"),
        ("nats://n:4222", "https://g/v1", "clients reject it"),
        ("nats://n:4222", "https://g:port", "clients reject it"),
        ("nats://n:4222", "http://gateway:8321", "clients reject it .*https://"),
    ],
)
def test_an_address_that_nobody_could_use(tmp_path: Path, nats: str, public_url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Bundles(Site(tmp_path / "state", {"default": ()}), nats, public_url).write()
    assert not (tmp_path / "state").exists(), "nothing is made before that"


def test_a_certificate_of_the_message_servers_stays(state: Path) -> None:
    """Without it they would speak plain from then on."""
    path = state / "bundles" / "nats" / "nats.conf"
    before = append(path, 'tls {cert_file: "/certs/x.pem", key_file: "/certs/x.key"} # ours\nmax_payload: 1MB\n')
    bundles(state, "--pool=legal")
    assert path.read_text() == before
    assert "POOL_legal" in (state / "bundles" / "nats" / "lacre.conf").read_text()


def test_what_a_person_adds_wins(state: Path) -> None:
    path, port = state / "bundles" / "nats" / "nats.conf", free_port()
    append(path, f"host: 127.0.0.1\nport: {port}\nmax_payload: 1MB\njetstream: disabled\n")
    with subprocess.Popen([executable(), "-c", str(path)], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("Server is ready" in line for line in process.stderr or ())
            with socket.create_connection(("127.0.0.1", port), 5) as connection, connection.makefile("rb") as lines:
                said = json.loads(lines.readline().removeprefix(b"INFO "))
        finally:
            process.terminate()
    assert said["max_payload"] == 2**20
    assert said["auth_required"], "the accounts are included"


def test_a_nats_conf_of_an_older_version(state: Path) -> None:
    """It had all in one file, as JSON."""
    path, included = (state / "bundles" / "nats" / name for name in ("nats.conf", "lacre.conf"))
    fresh, old = path.read_text(), json.loads(included.read_text())
    included.unlink()
    for more, added in (
        ({}, ""),
        ({"tls": {"cert_file": "/certs/é.pem"}}, '"tls": {\n "cert_file": "/certs/\\xC3\\xA9.pem"\n}\n'),
    ):
        path.write_text(json.dumps({**old, **more}, indent=1))
        bundles(state)
        assert path.read_text() == fresh + added
    path.write_text("port: 4222\naccounts { A { users: [] } }\n")
    with pytest.raises(subprocess.CalledProcessError):
        bundles(state)
    assert path.read_text() == "port: 4222\naccounts { A { users: [] } }\n"


@pytest.mark.parametrize("model", ["My Model (Q4)", "", "modèle", "m" * 129])
def test_a_model_that_has_no_such_id(state: Path, model: str) -> None:
    before = site_of(state)
    with pytest.raises(SettingsError, match="is not a valid model id"):
        Bundles(Site(state, {"default": (model,)}), "nats://nats:4222", "http://127.0.0.1:8321").write()
    assert site_of(state) == before


def test_a_pool_and_a_region_that_share_a_name_with_another_pool(tmp_path: Path) -> None:
    site = Site(tmp_path, {"a": ["m"], "a-eu": ["m"]}, regions=("lacre", "eu"))
    with pytest.raises(SettingsError, match="rename one"):
        site.replicated_roles()
