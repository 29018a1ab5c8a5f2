"""What one object says of another is so: selectors, ports, targets, and whatever a pod mounts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from chart.metrics import counted, named_in
from chart.rendering import NAMESPACE, Object, Pod, Rendered, parts, render

pytestmark = pytest.mark.slow


def named(pods: list[Pod]) -> set[str]:
    return {pod.name for pod in pods}


def test_controllers_select_their_own_pods_alone(chart: Rendered) -> None:
    for pod in chart.controlled:
        selector = pod.owner["spec"]["selector"]["matchLabels"]
        assert named(chart.selected(selector)) == {pod.name}
        for spread in pod.spec["topologySpreadConstraints"]:
            assert spread["labelSelector"]["matchLabels"] == selector


def test_services_lead_to_ports_of_their_pods(chart: Rendered) -> None:
    for service in chart.of("Service"):
        (pod,) = chart.selected(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= pod.ports.keys()
    for pod in chart.of_component("gateway") + chart.of_component("nats"):
        service = chart.one("Service", pod.owner["spec"]["serviceName"])
        assert service["spec"]["clusterIP"] == "None"
        assert named(chart.selected(service["spec"]["selector"])) == {pod.name}
    for pod in chart.of_component("worker") + chart.of_component("signer"):
        assert not pod.ports
        assert not [each for each in chart.of("Service") if pod in chart.selected(each["spec"]["selector"])]


def test_probes_ask_ports_that_are_there(chart: Rendered) -> None:
    for pod in chart.controlled:
        container = pod.main
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe].get("httpGet")
            assert "exec" in container[probe] if asked is None else asked["port"] in pod.ports


def test_autoscalers_and_budgets_have_their_targets(chart: Rendered) -> None:
    scaled = []
    for each in chart.of("HorizontalPodAutoscaler") + chart.of("ScaledObject"):
        target, spec = each["spec"]["scaleTargetRef"], each["spec"]
        scaled.append(target["name"])
        assert chart.one(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
        if each["kind"] == "ScaledObject":
            assert 1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
        else:
            assert 1 <= spec["minReplicas"] <= spec["maxReplicas"] <= 16, "instances of one credential"
    for each in chart.of("StatefulSet") + chart.of("Deployment"):
        told = "replicas" in each["spec"]
        assert told == (each["metadata"]["name"] not in scaled), "an upgrade would set back what was scaled"
    budgets = [each["spec"]["selector"]["matchLabels"] for each in chart.of("PodDisruptionBudget")]
    guarded = [frozenset(named(chart.selected(selector))) for selector in budgets]
    owners = {frozenset({pod.name}) for pod in chart.controlled}
    assert set(guarded) == (owners if chart.values["podDisruptionBudget"]["enabled"] else set())
    assert len(guarded) == len(set(guarded)), "a pod with two budgets cannot be evicted"


def test_who_scales_is_as_asked(chart: Rendered) -> None:
    assert bool(chart.of("HorizontalPodAutoscaler")) == chart.values["gateway"]["autoscaling"]["enabled"]
    common = chart.values["workers"]["autoscaling"]["enabled"]
    wanted = {name for name, own in chart.values["pools"].items() if own.get("autoscaling", {}).get("enabled", common)}
    assert {each["metadata"]["labels"]["lacre/pool"] for each in chart.of("ScaledObject")} == wanted


def references(chart: Rendered, kind: str) -> Iterator[tuple[str, Object]]:
    """Each volume of the pods that is made from one; kind: secret or configMap."""
    for pod in chart.pods:
        for volume in pod.spec["volumes"]:
            for source in (volume, *volume.get("projected", {}).get("sources", ())):
                if kind in source:
                    yield source[kind].get("secretName") or source[kind]["name"], volume


def theirs(chart: Rendered, kind: str) -> set[str]:
    """Those that the operator mounts beside the chart's own."""
    volumes = [volume for part in parts(chart) for volume in part.get("extraVolumes", ()) if kind in volume]
    return {volume[kind].get("secretName") or volume[kind]["name"] for volume in volumes}


def test_config_maps_are_there_with_what_is_mounted(chart: Rendered) -> None:
    brought = {chart.values["gateway"]["policies"], *theirs(chart, "configMap")}
    dashboards = {name for name in chart.names("ConfigMap") if name.endswith("-dashboard")}
    assert {name for name, _ in references(chart, "configMap")} - brought == chart.names("ConfigMap") - dashboards
    for pod in chart.pods:
        sources = {each["name"]: each["configMap"] for each in pod.spec["volumes"] if "configMap" in each}
        for mount in (mount for container in pod.containers for mount in container["volumeMounts"]):
            if mount["name"] in sources and "subPath" in mount:
                assert mount["subPath"] in chart.one("ConfigMap", sources[mount["name"]]["name"])["data"]


def secrets_used(chart: Rendered) -> set[str]:
    of_monitors = {
        each["tlsConfig"]["ca"]["secret"]["name"] for one in chart.of("ServiceMonitor") for each in one["spec"]["endpoints"]
    }
    return {name for name, _ in references(chart, "secret")} | of_monitors


def test_secrets_are_made_where_somebody_is_to_make_them(case: str) -> None:
    """With External Secrets and cert-manager, all that is used is made, and nothing else; without, the names are the same."""
    options = ("--set", "externalSecrets.enabled=true,externalSecrets.store.name=a,certManager.enabled=true")
    chart = render(case, *options)
    made = {each["spec"]["target"]["name"] for each in chart.of("ExternalSecret")}
    made |= {each["spec"]["secretName"] for each in chart.of("Certificate")}
    of_nats = set() if chart.values["nats"]["enabled"] else {chart.values["nats"]["external"]["caSecret"]} - {""}
    assert made == secrets_used(chart) - of_nats - theirs(chart, "secret")
    assert not chart.of("Secret"), "nothing secret passes through Helm"
    without = render(case, "--set", "externalSecrets.enabled=false,certManager.enabled=false")
    assert secrets_used(without) == secrets_used(chart)


def test_claims_accounts_and_volumes_are_there(chart: Rendered) -> None:
    for pod in chart.pods:
        for volume in pod.spec["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName", "lacre-models")
            assert claim in chart.names("PersistentVolumeClaim") or claim.startswith("lacre-models")
        assert pod.spec.get("serviceAccountName", "default") in chart.names("ServiceAccount") | {"default"}
        claims = [each["metadata"]["name"] for each in pod.owner["spec"].get("volumeClaimTemplates", ())]
        volumes = {*claims, *(each["name"] for each in pod.spec["volumes"])}
        assert volumes == {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}


def test_routes_lead_to_the_gateway(chart: Rendered) -> None:
    service = next(each for each in chart.of("Service") if each["metadata"]["name"].endswith("-gateway"))
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    for ingress in chart.of("Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend["name"] == service["metadata"]["name"]
        assert backend["port"]["name"] in ports
        notes = ingress["metadata"]["annotations"]
        assert notes["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
        assert int(notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= chart.values["longestStream"]
        assert ingress["spec"]["tls"][0]["hosts"] == [ingress["spec"]["rules"][0]["host"]]
    for route in chart.of("HTTPRoute"):
        (rule,) = route["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": ports["https"]}]
        assert set(rule["timeouts"].values()) == {"0s"}
    for policy in chart.of("BackendTLSPolicy"):
        assert policy["spec"]["targetRefs"][0]["name"] == service["metadata"]["name"]


def test_the_monitor_scrapes_each_instance_once(chart: Rendered) -> None:
    for monitor in chart.of("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [each for each in chart.of("Service") if wanted <= each["metadata"]["labels"].items()]
        (endpoint,) = monitor["spec"]["endpoints"]
        with_port = [each for each in services for port in each["spec"]["ports"] if port["name"] == endpoint["port"]]
        assert [each["spec"].get("clusterIP") for each in with_port] == ["None"]


def covers(pattern: str, host: str) -> bool:
    """RFC 6125 section 6.4.3."""
    return host == pattern or (pattern.startswith("*.") and host.partition(".")[2] == pattern[2:])


def hosts_of_nats(chart: Rendered) -> Iterator[str]:
    conf = chart.one("ConfigMap", "r-lacre-nats")["data"]["nats.conf"]
    yield from (urlsplit(word).hostname or "" for word in conf.split() if word.startswith("tls://"))
    yield f"r-lacre-nats.{NAMESPACE}.svc"


def test_certificates_are_for_the_names_that_are_used(case: str) -> None:
    chart = render(case, "--set", "certManager.enabled=true")
    names: dict[str, list[str]] = {each["metadata"]["name"]: each["spec"]["dnsNames"] for each in chart.of("Certificate")}
    if chart.values["nats"]["enabled"]:
        for host in hosts_of_nats(chart):
            assert any(covers(pattern, host) for pattern in names["r-lacre-nats"]), host
        servers = chart.one("StatefulSet", "r-lacre-nats")
        service, count = servers["spec"]["serviceName"], servers["spec"]["replicas"]
        routes = {f"r-lacre-nats-{number}.{service}.{NAMESPACE}.svc" for number in range(count)}
        assert routes < set(hosts_of_nats(chart))
    wanted: list[Any] = [urlsplit(chart.values["publicUrl"]).hostname]
    wanted += [each["tlsConfig"]["serverName"] for one in chart.of("ServiceMonitor") for each in one["spec"]["endpoints"]]
    wanted += [each["spec"]["validation"]["hostname"] for each in chart.of("BackendTLSPolicy")]
    for host in wanted:
        assert any(covers(pattern, host) for pattern in names["r-lacre-gateway"]), host


def test_metrics_that_scale_are_counted_by_the_gateway(chart: Rendered) -> None:
    for each in chart.of("HorizontalPodAutoscaler"):
        assert each["spec"]["metrics"][0]["pods"]["metric"]["name"] in counted()
    for each in chart.of("ScaledObject"):
        query = each["spec"]["triggers"][0]["metadata"]["query"]
        assert named_in(query) <= counted()
        assert f'pool="{each["metadata"]["labels"]["lacre/pool"]}"' in query
        assert f'region="{chart.values["nats"]["external"]["region"]}"' in query, "another region's workers are its own"
        assert query.startswith("max("), "each gateway tells of the same queue: no sum"


def test_the_dashboard_shows_what_the_gateway_counts() -> None:
    chart = render("on")
    board = yaml.safe_load(chart.one("ConfigMap", "r-lacre-dashboard")["data"]["lacre.json"])
    shown = {name for panel in board["panels"] for target in panel["targets"] for name in named_in(target["expr"])}
    assert len(shown) > 15
    assert shown <= counted()
