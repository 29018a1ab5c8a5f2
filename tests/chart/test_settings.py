"""What the chart writes into files is read by those whose files they are: gateway, worker, signer, and a real nats-server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from chart.playing import ENTRYPOINTS, PYTHON
from chart.preparing import certificate, mount
from chart.rendering import CHART, NAMESPACE, ROOT, Object, Rendered, leaves, render
from lacre.trust.manifest import ModelEntry
from lacre_backend import settings as of_worker
from lacre_backend.models.opening import Conditions
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.operate.model_digests import record, recorded
from lacre_fabric.operate.nats_server import MAX_BUFFERED, MAX_BUFFERED_BYTES, MAX_FILES, MAX_MEMORY, executable
from lacre_fabric.operate.site import Site
from lacre_fabric.settings import parse
from lacre_gateway import settings as of_gateway

pytestmark = pytest.mark.slow


def gateway_settings(chart: Rendered) -> of_gateway.GatewaySettings:
    (pod,) = chart.of_component("gateway")
    return of_gateway.parse(chart.file(pod, "gateway.toml"), Path("/etc/lacre/gateway.toml"))


def worker_settings(chart: Rendered) -> dict[str, of_worker.WorkerSettings]:
    """Of each pool."""
    texts = [chart.file(pod, "worker.toml") for pod in chart.of_component("worker")]
    found = [parse(of_worker.WorkerSettings, text, Path("/etc/lacre/worker.toml")) for text in texts]
    return {each.pool: each for each in found}


def test_the_gateway_reads_its_file(chart: Rendered) -> None:
    (pod,) = chart.of_component("gateway")
    settings, values = gateway_settings(chart), chart.values
    assert (settings.public_url, settings.trust) == (values["publicUrl"], values["trust"])
    assert settings.issuers[0].leeway == 5.0
    assert settings.issuers[0].claims.groups == tuple(values["issuers"][0]["claims"]["groups"].split("."))
    assert settings.admin is not None
    assert {"https": settings.listen.port, "admin": settings.admin.port} == pod.ports
    assert settings.listen.host == settings.admin.host == "0.0.0.0"
    assert settings.listen.tls is not None, "tokens pass, and the admin API has no other cover"
    assert (settings.policies is not None) == bool(values["gateway"]["policies"])
    assert (settings.tracing is not None) == bool(values["gateway"]["tracing"])
    scaling = values["gateway"]["autoscaling"]
    for number in range(scaling["maxReplicas"] if scaling["enabled"] else values["gateway"]["replicas"]):
        assert settings.as_instance(number).instance == f"g1__{number}"


BODIES_COST = 3  # bytes of memory for a byte of a body that is handed on (docs/operating.md)
PROCESS = 200 * 2**20  # bytes of a gateway that does nothing, with room


def test_what_a_gateway_may_hold_fits_its_memory(chart: Rendered) -> None:
    settings, values = gateway_settings(chart), chart.values["gateway"]
    [size] = re.findall(r"^(\d+)Gi$", values["resources"]["limits"]["memory"])
    assert PROCESS + BODIES_COST * settings.limits.body_bytes + settings.listen.held_bytes <= int(size) * 2**30
    assert settings.listen.connections_per_address == values["connectionsPerAddress"]


def test_everything_of_gateway_toml_can_be_said() -> None:
    settings = gateway_settings(render("on"))
    assert (settings.limits.queue_limit, settings.limits.requests_in_flight) == (20.0, 512)
    assert settings.models["smollm2-135m"].context == 2048
    assert settings.listen.trusted_proxies == ("10.0.0.7",)
    assert settings.log_level == "warning"
    assert settings.tracing is not None
    assert settings.tracing.sample == 0.1


def test_workers_read_theirs(chart: Rendered) -> None:
    found = worker_settings(chart)
    assert found.keys() == chart.values["pools"].keys()
    for pool, settings in found.items():
        own = chart.values["workers"] | chart.values["pools"][pool]
        served = settings.models if settings.upstream is None else settings.upstream.models
        assert [model.name for model in served] == [model["name"] for model in own.get("upstream", own)["models"]]
        assert settings.slots == (own["slots"] or None)
        assert settings.trust == chart.values["trust"]
        assert settings.nats.url == gateway_settings(chart).nats.url
        assert settings.nats.region == gateway_settings(chart).nats.region == chart.values["nats"]["external"]["region"]
        assert settings.kms == (chart.values["kms"] or "plain:")


def test_paths_lie_in_what_is_mounted(chart: Rendered) -> None:
    """What is only read in a mount that is read-only, what is written in one that is not."""
    for pod in chart.of_component("gateway") + chart.of_component("worker"):
        container = pod.main
        file = f"{pod.component}.toml"
        writable = {PurePosixPath(each["mountPath"]): not each.get("readOnly", False) for each in container["volumeMounts"]}
        assert container["args"][:2] == ["--settings", f"/etc/lacre/{file}"]
        assert PurePosixPath(container["args"][1]) in writable
        paths = re.findall(r'^\s*(\w+) = "(/[^"]+)"$', chart.file(pod, file), re.MULTILINE)
        paths = [(key, path) for key, path in paths if path != "/health"]  # a path of an upstream's server
        assert len(paths) > 4
        for key, path in paths:
            (at,) = [place for place in writable if PurePosixPath(path).is_relative_to(place)]
            assert writable[at] == (key in ("audit", "memory", "health")), path
        private = chart.values["nats"]["enabled"] or chart.values["nats"]["external"]["caSecret"]
        assert dict(paths).get("ca", "").startswith("/etc/lacre/nats-ca/") == bool(private)


def test_every_process_has_the_options_that_it_is_given() -> None:
    """Asked for by `--help` of the very commands."""
    for component, module in (("gateway", "lacre_gateway"), ("worker", "lacre_backend")):
        (container, *_) = render("on").of_component(component)[0].containers
        done = subprocess.run([sys.executable, "-P", "-m", module, "--help"], capture_output=True, text=True, check=True)
        for option in (each for each in container["args"] if each.startswith("--")):
            assert option in done.stdout


def test_nats_server_takes_its_configuration(chart: Rendered, tmp_path: Path) -> None:
    if not chart.values["nats"]["enabled"]:
        assert not chart.of_component("nats")
        return
    (pod,) = chart.of_component("nats")
    conf = chart.file(pod, "nats.conf").replace("/etc/nats", str(tmp_path)).replace("/data", str(tmp_path / "data"))
    (tmp_path / "nats.conf").write_text(conf)
    mount(tmp_path / "tls", certificate("localhost"))
    (tmp_path / "accounts").mkdir()
    roles = Site(tmp_path / "state", dict.fromkeys(chart.values["pools"], ("m1",))).replicated_roles()
    (tmp_path / "accounts" / "accounts.json").write_text(json.dumps({"accounts": accounts(roles)}, indent=1))
    done = subprocess.run(
        [executable(), "-t", "-c", str(tmp_path / "nats.conf")],
        env={"POD_NAME": "r-lacre-nats-0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    limits = {"max_payload": MAX_PAYLOAD, "max_memory_store": MAX_MEMORY, "max_file_store": MAX_FILES}
    buffers = {"max_buffered_msgs": MAX_BUFFERED, "max_buffered_size": MAX_BUFFERED_BYTES}
    for name, value in {**limits, **buffers}.items():
        assert re.search(rf"{name}: {value}\b", conf)
    assert "sync_interval: always" in conf
    listening = {int(port) for port in re.findall(r"(?:listen|http): 0\.0\.0\.0:(\d+)", conf)}
    assert listening == set(pod.ports.values())


def served_by(worker: of_worker.WorkerSettings) -> list[str]:
    """The models that a manifest names for it."""
    if worker.upstream is not None:
        return [model.name for model in worker.upstream.models]
    return [name for m in worker.models for name in (m.name, *(f"{m.name}:{adapter}" for adapter in m.adapters))]


def test_the_signer_s_site(chart: Rendered, tmp_path: Path) -> None:
    for pod in chart.of_component("signer"):
        content = chart.one("ConfigMap", "r-lacre-signer")["data"]["site.json"]
        (tmp_path / "site.json").write_text(content)
        site = Site.load(tmp_path)
        assert site.pools == {pool: served_by(each) for pool, each in worker_settings(chart).items()}
        assert (site.servers, site.base_url) == (gateway_settings(chart).nats.servers, chart.values["publicUrl"])
        assert site.replicas == 3
        assert list(site.regions) == (chart.values["nats"]["external"]["regions"] or [gateway_settings(chart).nats.region])
        rotating = chart.values["signer"]["rotateHours"] > 0
        assert rotating <= chart.values["poolKeys"]["volume"]["enabled"], "new keys that no worker would see"
        hours = pod.spec["containers"][0]["command"][-1]
        assert float(hours) == chart.values["signer"]["rotateHours"]


def seeded(archive: Path, state: Path, *keys: Path, made: Path | None = None, models: Object | None = None) -> None:
    if made is not None:
        with tarfile.open(archive, "w") as out:
            out.add(made, ".")
    script = archive.with_name("seed.py")
    script.write_bytes((CHART / "files" / "seed.py").read_bytes())
    archive.with_name("models.json").write_text(json.dumps({"pools": models or {}}))
    subprocess.run([sys.executable, script, archive, state, *keys], check=True)


def test_the_state_is_seeded_once(tmp_path: Path) -> None:
    archive, made, state, keys = (tmp_path / name for name in ("state.tar", "made", "state", "keys"))
    for folder in (state, keys / "default", keys / "new"):
        folder.mkdir(parents=True)
    Site(made, {"default": ("m1",)}).create()
    seeded(archive, state, keys, made=made)
    for name in ("signer.pem", "trust/chain.json", "pools/default/generations.json", "pools/default/keys/1.key"):
        assert (state / name).read_bytes() == (made / name).read_bytes()
        assert (state / name).stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (keys / "default").iterdir()} == {"1.key", "2.key"}

    (state / "pools/default/keys/1.key").unlink()
    (state / "trust/version").write_text("7")
    seeded(archive, state, keys)
    assert not (keys / "default/1.key").exists(), "a key that was destroyed does not come back"
    assert (state / "trust/version").read_text() == "7"

    Site(made, {"default": ("m1",), "new": ("m1",)}).create()
    seeded(archive, state, keys, made=made)
    assert (keys / "new/1.key").exists()
    assert not (keys / "default/1.key").exists()


def names(state: Path, *pools: str) -> None:
    """The chart mounts such a file into the state."""
    (state / "site.json").write_text(json.dumps({"pools": {pool: ["m1"] for pool in pools}}))


@pytest.mark.parametrize("volume", [True, False], ids=["keys on a volume", "keys in the state"])
def test_a_removed_pool_is_destroyed_and_can_come_back(tmp_path: Path, volume: bool) -> None:
    archive, made, state, keys = (tmp_path / name for name in ("state.tar", "made", "state", "keys"))
    for folder in (state, keys / "default", keys / "gone"):
        folder.mkdir(parents=True)
    place = (keys,) if volume else ()
    Site(made, {"default": ("m1",), "gone": ("m1",)}).create()
    names(state, "default", "gone")
    seeded(archive, state, *place, made=made)
    old = (state / "pools/gone/keys/1.key").read_bytes()
    (made / "pools/gone/receipt.pem").unlink()  # as `lacre pool remove` leaves the folder: generations.json stays
    for path in (made / "pools/gone/keys").iterdir():
        path.unlink()
    seeded(archive, state, *place, made=made)
    assert (state / "pools/gone/keys/1.key").exists(), "the values still name it"

    held = (state / "pools/gone/keys/1.key").open("rb")  # sees what is written in place
    kept = {path: path.read_bytes() for path in (state / "pools/default").rglob("*") if path.is_file()}
    names(state, "default")
    seeded(archive, state, *place)
    with held:
        assert held.read() == bytes(len(old))
    assert not (state / "pools/gone").exists()
    assert not list((keys / "gone").iterdir())
    assert {path: path.read_bytes() for path in kept} == kept

    (made / "pools/gone/generations.json").unlink()
    Site(made, {"default": ("m1",), "gone": ("m1",)}).create()
    names(state, "default", "gone")
    seeded(archive, state, *place, made=made)
    for name in ("receipt.pem", "generations.json", "keys/1.key"):
        assert (state / "pools/gone" / name).read_bytes() == (made / "pools/gone" / name).read_bytes()
    assert (state / "pools/gone/keys/1.key").read_bytes() != old


def test_a_removed_pool_whose_volume_is_gone(tmp_path: Path) -> None:
    archive, made, state, keys = (tmp_path / name for name in ("state.tar", "made", "state", "keys"))
    for folder in (state, keys / "default", keys / "gone"):
        folder.mkdir(parents=True)
    Site(made, {"default": ("m1",), "gone": ("m1",)}).create()
    seeded(archive, state, keys, made=made)
    shutil.rmtree(keys / "gone")
    shutil.rmtree(made / "pools/gone")
    names(state, "default")
    seeded(archive, state, keys, made=made)
    assert not (state / "pools/gone").exists()
    assert (state / "pools/default/keys/1.key").exists()


def test_the_manifest_names_the_files_of_the_values(tmp_path: Path) -> None:
    """Those of the archive stay until the values name some; then the values alone count."""
    archive, made, state = (tmp_path / name for name in ("state.tar", "made", "state"))
    state.mkdir()
    site = Site(made, {"default": ("smollm2-135m",), "other": ("smollm2-135m", "smollm2-135m:legal")})
    site.create()
    record(site.models_file, "default", {"smollm2-135m": ModelEntry(("3" * 64,))})
    seeded(archive, state, made=made)
    kept = Site(state, site.pools).models_file
    assert recorded(kept)["default"]["smollm2-135m"].sha256 == ("3" * 64,)

    said = render("on").one("ConfigMap", "r-lacre-signer")["data"]["models.json"]
    seeded(archive, state, models=json.loads(said)["pools"])
    found = recorded(kept)
    assert found.keys() == {"other"}
    assert found["other"]["smollm2-135m"].signers == ("1" * 64,)
    assert found["other"]["smollm2-135m:legal"] == ModelEntry(("2" * 64,))
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_sealed_and_signed_model_in_a_pod() -> None:
    settings = worker_settings(render("on"))["other"]
    (model,) = settings.models
    assert model.conditions(settings.kms) == Conditions(
        "vault://vault.vault.svc:8200/transit/lacre-pools", sealed=True, signers=(Path("/etc/lacre/signers/release.pem"),)
    )
    pod = next(pod for pod in render("on").of_component("worker") if pod.name.endswith("other"))
    (volume,) = [each["configMap"] for each in pod.spec["volumes"] if each["name"] == "signers"]
    assert volume["items"] == [{"key": "release.pem", "path": "release.pem"}]
    assert render("on").file(pod, "release.pem").startswith("-----BEGIN PUBLIC KEY-----\n")


def test_an_archive_does_not_reach_out_of_the_state(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with tarfile.open(tmp_path / "state.tar", "w") as out:
        out.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(subprocess.CalledProcessError):
        seeded(tmp_path / "state.tar", tmp_path / "state")
    assert not (tmp_path / "outside").exists()


def test_nothing_of_the_cluster_is_written_out(chart: Rendered) -> None:
    """Addresses are of the release's own namespace, whichever it is."""
    written = [value for each in chart.objects for _, value in leaves(each) if isinstance(value, str)]
    assert not [value for value in written if ".default.svc" in value or "kubernetes.default" in value]
    if chart.values["nats"]["enabled"]:
        assert all(f".{NAMESPACE}.svc:" in url for url in gateway_settings(chart).nats.url)


@pytest.mark.parametrize(("image", "module"), ENTRYPOINTS.items())
def test_images_begin_with_what_is_played(image: str, module: str) -> None:
    """And they bring the interpreter that probes and the signer name, for the user that pods run as."""
    stage = (ROOT / "Dockerfile").read_text().partition(f" AS {image.removeprefix('lacre-')}\n")[2].partition("\nFROM ")[0]
    assert f'ENTRYPOINT ["{PYTHON}", "-P", "-m", "{module}"]' in stage
    assert "USER 65532:65532" in stage
