"""What every pod is allowed and given: the restricted profile field by field, no secret in its environment, resources, time."""

from __future__ import annotations

import tomllib

import pytest

from chart.rendering import Pod, Rendered, leaves, render

pytestmark = pytest.mark.slow
ENVIRONMENT = {"GOMEMLIMIT", "INSTANCE", "NODE", "POD_NAME", "SSL_CERT_FILE"}  # a size, names and a path
# Pod Security Standards, restricted: the sources that a volume may have.
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
CLOSING = 10  # seconds beyond the drain: docs/operating.md


def of_pods(chart: Rendered) -> list[Pod]:
    assert chart.pods
    return chart.pods


def test_restricted_pods(chart: Rendered) -> None:
    for pod in of_pods(chart):
        spec = pod.spec
        for share in ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace"):
            assert share not in spec
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"sysctls", "seLinuxOptions", "supplementalGroups", "windowsOptions"} & security.keys()
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= VOLUMES
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
    assert all(each["automountServiceAccountToken"] is False for each in chart.of("ServiceAccount"))
    assert not chart.of("Role") + chart.of("ClusterRole") + chart.of("RoleBinding"), "nobody asks the Kubernetes API"


def test_restricted_containers(chart: Rendered) -> None:
    for pod in of_pods(chart):
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not [port for port in container.get("ports", ()) if "hostPort" in port]
            assert ":" in container["image"].rpartition("/")[2], "an image has a version"
            assert "latest" not in container["image"]


def test_no_secret_is_in_an_environment(chart: Rendered) -> None:
    for pod in of_pods(chart):
        for container in pod.containers:
            assert "envFrom" not in container
            for variable in container.get("env", ()):
                assert variable["name"] in ENVIRONMENT
                assert not {"secretKeyRef", "configMapKeyRef"} & variable.get("valueFrom", {}).keys()
    assert "secretKeyRef" not in {name for each in chart.objects for name, _ in leaves(each)}


def test_secrets_are_files_of_their_owner(chart: Rendered) -> None:
    for pod in of_pods(chart):
        for volume in pod.spec["volumes"]:
            secret = volume.get("secret")
            if secret is None:
                continue
            public = [item["key"] for item in secret.get("items", ())] == ["ca.crt"]
            assert public or secret["defaultMode"] == 0o400, volume["name"]
            used = [each for one in pod.containers for each in one["volumeMounts"] if each["name"] == volume["name"]]
            assert all(each["readOnly"] for each in used)


def test_each_pod_has_its_own_secrets_alone(chart: Rendered) -> None:
    """What signs manifests is the signer's, what signs grants the gateway's, a pool's keys its workers'."""
    held: dict[str, set[str]] = {}
    for pod in of_pods(chart):
        names = {
            volume["secret"]["secretName"]
            for volume in pod.spec["volumes"]
            if "secret" in volume and [item["key"] for item in volume["secret"].get("items", ())] != ["ca.crt"]
        }
        held.setdefault(pod.owner["metadata"]["name"].removesuffix("-1"), set()).update(names)
    assert all(held.values())
    for one, secrets in held.items():
        for other, others in held.items():
            assert one == other or not secrets & others, (one, other)


def test_resources_are_set(chart: Rendered) -> None:
    for pod in of_pods(chart):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys()
            assert "memory" in resources["limits"]
        for volume in pod.spec["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


def test_the_pool_volumes_of_two_pools_are_two(chart: Rendered) -> None:
    claims = {
        pod.labels["lacre/pool"]: next(each for each in pod.spec["volumes"] if each["name"] == "keys")
        for pod in chart.of_component("worker")
    }
    sources = [str(each) for each in claims.values()]
    assert len(sources) == len(set(sources))


def test_gpus() -> None:
    chart = render("gpu")
    (pod,) = chart.of_component("worker")
    assert pod.containers[0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod.containers[0]["resources"]["limits"]["memory"] == "8Gi"
    assert pod.containers[0]["image"].startswith("lacre-worker-cuda:")
    tolerated = [each["key"] for each in pod.spec["tolerations"]]
    assert tolerated == ["spot", "nvidia.com/gpu"]
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
    settings = tomllib.loads(chart.one("ConfigMap", gateway.owner["metadata"]["name"])["data"]["gateway.toml"])
    assert settings["limits"]["longest_stream"] == longest
    assert settings["listen"]["drain"] >= longest
    drain = settings["listen"]["drain_delay"] + settings["listen"]["drain"]
    assert gateway.spec["terminationGracePeriodSeconds"] >= drain + CLOSING
    for worker in chart.of_component("worker"):
        settings = tomllib.loads(chart.one("ConfigMap", worker.owner["metadata"]["name"])["data"]["worker.toml"])
        assert settings["drain"] >= longest
        assert worker.spec["terminationGracePeriodSeconds"] >= settings["drain"] + CLOSING


def test_each_gateway_keeps_a_log_of_its_own(chart: Rendered) -> None:
    (gateway,) = chart.of_component("gateway")
    (claim,) = gateway.owner["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert gateway.owner["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
