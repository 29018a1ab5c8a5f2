"""The images, built and run as deploy/compose.yaml says: a sealed chat through them, and what they cannot do."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from typing import NamedTuple

import httpx2
import pytest

import lacre
from lacre_backend.models.gguf import find
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.work.model_names import DEFAULT_MODEL
from parts.containers import (
    BASE,
    CERTIFICATES,
    NOBODY,
    PYTHON,
    ROOT,
    Deployment,
    Engine,
    Images,
    missing,
    tell,
    until,
)  # fmt: skip

READY_WITHIN = 3.0  # seconds from the start of a gateway's container to the first request that it would serve
WORKERS = ("worker-1", "worker-2")

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=f"no containers here: {missing()}"),
]


class Live(NamedTuple):
    deployment: Deployment
    url: str
    token: str
    base_url: str


@pytest.fixture(scope="module")
def live(podman: Engine, images: Images) -> Live:
    """Everything of compose.yaml, started in its order."""
    state, models, port = podman.folder / "state", podman.folder / "models", free_port()
    models.mkdir()
    shutil.copy(find().path, models / f"{DEFAULT_MODEL}.gguf")
    state.mkdir(0o700)
    os.chown(state, NOBODY, NOBODY)
    variables = {
        "LACRE_STATE": str(state), "LACRE_MODELS": str(models), "LACRE_PORT": str(port), "LACRE_NATS_IMAGE": images.nats,
        "LACRE_GATEWAY_IMAGE": images.gateway, "LACRE_WORKER_IMAGE": images.worker,
    }  # fmt: skip

    deployment = Deployment(podman, variables)
    url = deployment.once("bundles")
    token = deployment.once("bundles", "token", "issue", "--state=/state")
    deployment.start("nats")
    deployment.start("signer")
    began = deployment.start("gateway")
    base_url = f"http://127.0.0.1:{port}"
    until(lambda: answers(base_url), "gateway")
    tell(f"gateway: ready {time.monotonic() - began:.1f} s after its start, the signer's first manifest included")
    for worker in WORKERS:
        began = deployment.start(worker)
        await_ready(podman, worker)
        tell(f"{worker}: ready {time.monotonic() - began:.1f} s after its start, the model loaded")
    return Live(deployment, url, token, base_url)


def answers(base_url: str) -> bool:
    try:
        return httpx2.get(f"{base_url}/readyz", timeout=2, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def await_ready(podman: Engine, worker: str) -> None:
    asking = (PYTHON, "-P", "-m", "lacre_backend.health", "--settings=/etc/lacre/worker.toml", "--ready")
    until(lambda: podman.succeeds("exec", worker, *asking), worker)


def inside(podman: Engine, service: str, code: str) -> str:
    return podman.podman("exec", service, PYTHON, "-c", code)


def chat(live: Live) -> None:
    with lacre.Client(live.url, token=live.token, memory=lacre.VersionMemory()) as client:
        stream = client.chat_stream("Name three seas.", max_tokens=8)
        assert "".join(stream)
        assert stream.receipt is not None and 0 < stream.receipt.completion_tokens <= 8


@pytest.mark.parametrize("target", ["gateway", "worker"])
def test_what_an_image_says_of_itself(podman: Engine, images: Images, target: str) -> None:
    image = getattr(images, target)
    layers = podman.layers(image)
    tell(f"{target}: {sum(size for size, _ in layers) / 2**20:.0f} MiB in layers of")
    for size, origin in layers:
        tell(f"  {size / 2**20:7.1f} MiB  {origin.removeprefix('/bin/sh -c #(nop) ')[:100]}")
    found = podman.inspect(image)
    config = found["Config"]
    assert config["User"] == f"{NOBODY}:{NOBODY}"
    assert config["StopSignal"] == "SIGTERM"
    assert found["Healthcheck"]["Test"][0] == "CMD", "no shell is needed"
    assert config["Labels"]["org.opencontainers.image.revision"] != "unknown"
    assert not [name for name in config["Env"] if re.match(r"(PIP|LACRE|SSL)_", name)]


# Run in an image, as root, who may look everywhere: what is left of a build, its packages, and the digest of its certificates.
LOOK = f"""
import hashlib, json, pathlib
from importlib.metadata import distributions
names = ["/wheels", "/tools", "/src", "/dist", "/llama", "/etc/pip.conf", "/root/.cache/pip"]
left = [name for name in names if pathlib.Path(name).exists()]
certificates = pathlib.Path("{CERTIFICATES}")
digest = hashlib.sha256(certificates.read_bytes()).hexdigest() if certificates.exists() else None
packages = [str(found) for found in pathlib.Path("/opt").glob("lacre/lib/python3*/site-packages")]
left += [str(found) for at in packages for name in ("pip", "tests", "nats_server") for found in pathlib.Path(at).rglob(name)]
print(json.dumps([left, [found.name for found in distributions(path=packages)], digest]))
"""


def look(podman: Engine, image: str, python: str) -> tuple[list[str], set[str], str | None]:
    left, names, digest = json.loads(
        podman.podman("run", "--rm", "--network=none", "--user=0", f"--entrypoint={python}", image, "-c", LOOK)
    )
    return left, {normal(name) for name in names}, digest


def normal(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("target", "part"), [("gateway", "fastapi"), ("worker", "llama-cpp-python")])
def test_an_image_holds_what_is_listed_and_nothing_of_the_build(podman: Engine, images: Images, target: str, part: str) -> None:
    left, installed, certificates = look(podman, getattr(images, target), PYTHON)
    assert left == []
    assert certificates == look(podman, BASE, "/usr/bin/python3")[2], "those that the build was given stayed outside"
    listed = json.loads((ROOT / "build" / "sbom" / f"{target}.cdx.json").read_text())["components"]
    assert part in installed
    assert installed <= {normal(component["name"]) for component in listed} | {"lacre", "lacre-server"}


def test_a_sealed_chat_by_either_worker(podman: Engine, live: Live) -> None:
    chat(live)
    for worker in WORKERS:
        podman.podman("stop", worker)
        assert podman.podman("inspect", "--format={{.State.ExitCode}}", worker) == "0", "it drained"
        chat(live)
        podman.podman("start", worker)
        await_ready(podman, worker)


@pytest.mark.parametrize("service", ["gateway", "signer", *WORKERS])
def test_a_process_is_well_and_has_no_more_than_it_needs(podman: Engine, live: Live, service: str) -> None:
    assert service == "signer" or podman.succeeds("healthcheck", "run", service)
    status = inside(podman, service, "print(open('/proc/1/status').read())")
    facts = dict(re.findall(r"^(\w+):\t(.*)$", status, re.MULTILINE))
    assert facts["Uid"].split() == [str(NOBODY)] * 4
    assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
    assert facts["NoNewPrivs"] == "1"
    code = "import pathlib\ntry: pathlib.Path('/opt/lacre/x').write_text('')\nexcept OSError as exc: print(exc.errno)"
    assert inside(podman, service, code) == "30", "EROFS"
    found = inside(podman, service, "import pathlib; print(*(str(p) for p in pathlib.Path('/').rglob('*.pem')))")
    assert ("root.pem" in found, "signer.pem" in found) == (service == "signer", service == "signer")


@pytest.mark.parametrize("service", ["gateway", "worker-1"])
def test_the_clouds_key_management_services_can_be_asked(podman: Engine, live: Live, service: str) -> None:
    modules = ", ".join(f"lacre_fabric.keys.kms.{name}" for name in ("aws", "google", "azure", "vault"))
    assert inside(podman, service, f"import {modules}; print('all')").strip() == "all"


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_is_on_no_way(podman: Engine, live: Live, worker: str) -> None:
    """It listens on nothing, and reaches nothing but its own network."""
    families = "[each for each in ('tcp', 'tcp6') if os.path.exists('/proc/net/' + each)]"  # a kernel may have no IPv6
    sockets = f"[line for each in {families} for line in open('/proc/net/' + each).read().splitlines()[1:]]"
    assert inside(podman, worker, f"import os; print([line for line in {sockets} if line.split()[3] == '0A'])") == "[]"
    routes = inside(podman, worker, "print([x.split()[1] for x in open('/proc/net/route').read().splitlines()[1:]])")
    assert "00000000" not in routes, "no default route"
    # A destination of no bits, by a device that leads somewhere.
    lines = "(open('/proc/net/ipv6_route') if os.path.exists('/proc/net/ipv6_route') else [])"
    default = f"[line for line in {lines} if line.split()[1] == '00' and line.split()[9] != 'lo']"
    assert inside(podman, worker, f"import os; print({default})") == "[]"


def test_a_gateway_is_ready_soon(podman: Engine, live: Live) -> None:
    """The better of two starts: another program may have the machine at the moment."""
    took = []
    for _ in range(2):
        podman.podman("stop", "gateway")
        assert podman.podman("inspect", "--format={{.State.ExitCode}}", "gateway") == "0"
        began = time.monotonic()
        podman.podman("start", "gateway")
        until(lambda: answers(live.base_url), "gateway")
        took.append(time.monotonic() - began)
    tell(f"gateway: ready {' and '.join(f'{seconds:.1f} s' for seconds in took)} after a restart")
    assert min(took) < READY_WITHIN
    chat(live)
