"""What every pod is allowed and given: the restricted profile field by field, no secret in its environment, resources, time."""

from __future__ import annotations

import tomllib
from itertools import combinations

import pytest

from chart.rendering import Object, Pod, Rendered, leaves, parts, render

pytestmark = pytest.mark.slow
ENVIRONMENT = {"GOMEMLIMIT", "INSTANCE", "NODE", "POD_NAME"}  # a size and names
# Pod Security Standards, restricted: the sources that a volume may have.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CLOSING = 10  # seconds beyond the drain: docs/operating.md


def test_restricted_pods(chart: Rendered) -> None:
    for pod in chart.pods:
        spec, security = pod.spec, pod.spec["securityContext"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace"} & spec.keys()
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"sysctls", "seLinuxOptions", "supplementalGroups", "windowsOptions"} & security.keys()
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= VOLUMES
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert all(each["automountServiceAccountToken"] is False for each in chart.of("ServiceAccount"))
    assert not chart.of("Role") + chart.of("ClusterRole") + chart.of("RoleBinding"), "nobody asks the Kubernetes API"


def test_restricted_containers(chart: Rendered) -> None:
    for container in chart.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [port for port in container.get("ports", ()) if "hostPort" in port]
        assert ":" in container["image"].rpartition("/")[2], "an image has a version"
        assert "latest" not in container["image"]


def test_no_secret_is_in_an_environment(chart: Rendered) -> None:
    chosen = {each["name"] for part in parts(chart) for each in part.get("env", ())}
    for container in chart.containers:
        assert "envFrom" not in container
        for variable in container.get("env", ()):
            assert variable["name"] in ENVIRONMENT | chosen
            assert not {"secretKeyRef", "configMapKeyRef"} & variable.get("valueFrom", {}).keys()
    assert "secretKeyRef" not in {name for each in chart.objects for name, _ in leaves(each)}


def secrets(pod: Pod) -> dict[str, Object]:
    """The pod's volumes with something secret, by name."""
    found = {volume["name"]: volume["secret"] for volume in pod.spec["volumes"] if "secret" in volume}
    return {name: each for name, each in found.items() if [item["key"] for item in each.get("items", ())] != ["ca.crt"]}


def test_secrets_are_files_of_their_owner(chart: Rendered) -> None:
    for pod in chart.pods:
        for secret in secrets(pod).values():
            assert secret["defaultMode"] == 0o400, secret
        files = {volume["name"] for volume in pod.spec["volumes"] if "secret" in volume}
        mounts = [mount for one in pod.containers for mount in one["volumeMounts"] if mount["name"] in files]
        assert all(mount["readOnly"] for mount in mounts)


def test_each_pod_has_its_own_secrets_alone(chart: Rendered) -> None:
    """What signs manifests is the signer's, what signs grants the gateway's, a pool's keys its workers'."""
    held: dict[str, set[str]] = {}
    for pod in chart.pods:
        names = {each["secretName"] for each in secrets(pod).values()}
        held.setdefault(pod.name.removesuffix("-1"), set()).update(names)
    assert all(held.values())
    for (one, some), (other, others) in combinations(held.items(), 2):
        assert not some & others, (one, other)


def test_resources_are_set(chart: Rendered) -> None:
    for container in chart.containers:
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert "memory" in resources["limits"]
    for volume in (volume for pod in chart.pods for volume in pod.spec["volumes"]):
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


def test_the_pool_volumes_of_two_pools_are_two(chart: Rendered) -> None:
    volumes = [each for pod in chart.of_component("worker") for each in pod.spec["volumes"] if each["name"] == "keys"]
    assert len(volumes) == len(chart.values["pools"]) == len(set(map(str, volumes)))


def test_gpus() -> None:
    (pod,) = render("gpu").of_component("worker")
    limits = pod.containers[0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["memory"]) == (2, "8Gi")
    assert pod.containers[0]["image"].startswith("lacre-worker-cuda:")
    assert [each["key"] for each in pod.spec["tolerations"]] == ["spot", "nvidia.com/gpu"]
    assert pod.spec["runtimeClassName"] == "nvidia"
    assert "tolerations" not in render("defaults").of_component("worker")[0].spec


@pytest.mark.parametrize("cloud", ["aws", "azure", "gcp"])
def test_a_cloud_s_values(cloud: str) -> None:
    chart = render(cloud)
    workers = {pod.labels["lacre/pool"]: pod for pod in chart.of_component("worker")}
    assert workers.keys() == {"default", "large"}
    assert all("spot" in str(pod.spec["nodeSelector"]) + str(pod.spec.get("tolerations")) for pod in workers.values())
    assert "nvidia.com/gpu" in workers["large"].containers[0]["resources"]["limits"]
    identities = {each["metadata"]["name"]: str(each["metadata"].get("annotations", "")) for each in chart.of("ServiceAccount")}
    assert identities["r-lacre-worker-default"]
    assert identities["r-lacre-worker-default"] == identities["r-lacre-worker-large"] != identities["r-lacre-signer"]
    assert not identities["r-lacre-gateway"], "a gateway asks no KMS"
    if cloud == "azure":
        assert workers["default"].labels["azure.workload.identity/use"] == "true"


def test_grace_is_longer_than_the_longest_stream(chart: Rendered) -> None:
    longest = chart.values["longestStream"]
    (gateway,) = chart.of_component("gateway")
    settings = tomllib.loads(chart.file(gateway, "gateway.toml"))
    assert settings["limits"]["longest_stream"] == longest
    drains = {gateway.name: (gateway, settings["listen"]["drain_delay"], settings["listen"]["drain"])}
    for worker in chart.of_component("worker"):
        drains[worker.name] = worker, 0, tomllib.loads(chart.file(worker, "worker.toml"))["drain"]
    for pod, delay, drain in drains.values():
        assert drain >= longest
        assert pod.spec["terminationGracePeriodSeconds"] >= delay + drain + CLOSING


def test_each_gateway_keeps_a_log_of_its_own(chart: Rendered) -> None:
    (gateway,) = chart.of_component("gateway")
    (claim,) = gateway.owner["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert gateway.owner["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
