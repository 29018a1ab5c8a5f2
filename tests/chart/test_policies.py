"""The network policies let through every edge that the settings ask for, and none besides."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from chart.edges import Party, like, matches, passes, reaches
from chart.rendering import CASES, NAMESPACE, Object, Rendered, render
from lacre.runtime.hosts import is_loopback

pytestmark = pytest.mark.slow
Edge = tuple[str, str, int, str]  # from, to, port, protocol
# Those of any port that something of ours listens on or asks, and some that nobody should.
MORE_PORTS = {22, 80, 443, 987, 988, 4222, 4443, 6222, 8080, 8200, 8222, 8321, 8322, 8443, 10250}
STRANGERS = (
    Party("a pod of the namespace", namespace=NAMESPACE, labels={"app": "other"}),
    Party("a pod elsewhere", namespace="other", labels={"app": "other"}),
    Party("another release's worker", namespace=NAMESPACE, labels={
        "app.kubernetes.io/name": "lacre", "app.kubernetes.io/instance": "other", "app.kubernetes.io/component": "worker",
    }),
    Party("the internet", address="198.51.100.7"),
    Party("a private address", address="10.20.30.40"),
    Party("the metadata service", address="169.254.169.254"),
)  # fmt: skip


@pytest.fixture(params=[name for name in CASES if name != "off"])
def guarded(request: pytest.FixtureRequest) -> Rendered:
    return render(str(request.param))


def ours(chart: Rendered) -> list[Party]:
    """One pod of each component, of each pool."""
    found = {}
    for pod in chart.pods:
        name = "-".join(filter(None, (pod.component, pod.labels.get("lacre/pool"))))
        found[name] = Party(name, namespace=NAMESPACE, labels=pod.labels, ours=True)
    return list(found.values())


def others(chart: Rendered) -> dict[str, list[Party]]:
    """By what the values call them: somebody whom each peer there means."""
    policy = chart.values["networkPolicy"]
    named = {
        kind: [like(peer, f"{kind} {i}") for i, peer in enumerate(policy[kind])]
        for kind in ("clients", "scrapers", "dns", "issuers", "collectors", "webhooks", "kms", "upstreams")
    }
    cidrs = [{"ipBlock": {"cidr": each}} for each in chart.values["nats"]["external"].get("cidrs", ())]
    return named | {"their nats": [like(peer, f"their nats {i}") for i, peer in enumerate(cidrs)]}


def settings(chart: Rendered, component: str) -> list[Object]:
    return [
        tomllib.loads(chart.one("ConfigMap", pod.owner["metadata"]["name"])["data"][f"{component}.toml"])
        for pod in chart.of_component(component)
    ]


def asked(chart: Rendered) -> Iterator[tuple[str, str, int]]:
    """Component, whom it asks (as `others` has it, or a component of ours), and the port: by the files that it runs by."""
    (gateway,) = settings(chart, "gateway")
    inside = chart.values["nats"]["enabled"]
    port = urlsplit(gateway["nats"]["url"]).port or 4222
    for component in ("gateway", "worker", "signer"):
        yield component, "our nats" if inside else "their nats", port
    for issuer in gateway["issuers"]:
        yield "gateway", "issuers", urlsplit(issuer["issuer"]).port or 443
    if "tracing" in gateway:
        yield "gateway", "collectors", urlsplit(gateway["tracing"]["endpoint"]).port or 443
    if "alerts" in gateway:
        yield "gateway", "webhooks", urlsplit(gateway["alerts"]["url"]).port or 443
    for pool, worker in ((worker["pool"], worker) for worker in settings(chart, "worker")):
        upstream = worker.get("upstream", {})
        for origin in (*upstream.get("origins", ()), *filter(None, [upstream.get("origin")])):
            if not is_loopback(urlsplit(origin).hostname or ""):
                yield f"worker-{pool}", "upstreams", urlsplit(origin).port or 443
    if any("kms" in worker for worker in settings(chart, "worker")):
        for port in chart.values["networkPolicy"]["kmsPorts"]:
            yield "worker", "kms", port
            yield "signer", "kms", port
    if inside:
        yield "nats", "our nats", 6222
    yield "clients", "our gateway", gateway["listen"]["port"]
    if chart.of("ServiceMonitor"):
        yield "scrapers", "our gateway", gateway["admin"]["port"]


def needed(chart: Rendered) -> set[Edge]:
    parties, kinds = ours(chart), others(chart)
    everybody = [*parties, *(each for group in kinds.values() for each in group), *STRANGERS]
    policy = chart.values["networkPolicy"]

    def called(kind: str) -> list[Party]:
        if kind in kinds:
            peers = policy.get(kind) or [{"ipBlock": {"cidr": each}} for each in chart.values["nats"]["external"]["cidrs"]]
            return [each for each in everybody if not each.ours and any(matches(peer, each) for peer in peers)]
        wanted = kind.removeprefix("our ")
        return [each for each in parties if wanted in (each.name, each.labels["app.kubernetes.io/component"])]

    found: set[Edge] = set()
    for source, target, port in asked(chart):
        found |= {(a.name, b.name, port, "TCP") for a in called(source) for b in called(target)}
    for party in parties:
        found |= {(party.name, each.name, 53, protocol) for each in called("dns") for protocol in ("TCP", "UDP")}
    return found


def let_through(chart: Rendered) -> set[Edge]:
    parties = ours(chart)
    everybody = [*parties, *(each for group in others(chart).values() for each in group), *STRANGERS]
    ports = {(port, "TCP") for port in {port for _, _, port in asked(chart)} | MORE_PORTS} | {(53, "TCP"), (53, "UDP")}
    return {
        (source.name, target.name, port, protocol)
        for source in everybody
        for target in everybody
        if source.ours or target.ours
        for port, protocol in ports
        if reaches(chart.of("NetworkPolicy"), source, target, port, protocol)
    }


def test_every_edge_that_is_needed_and_no_other(guarded: Rendered) -> None:
    wanted, possible = needed(guarded), let_through(guarded)
    assert wanted - possible == set(), "it would not work"
    assert possible - wanted == set(), "more than is needed"


def test_neither_side_alone_lets_more_through(guarded: Rendered) -> None:
    """What one policy forbids, no other one allows: each holds where the other is taken away."""
    wanted, policies, parties = needed(guarded), guarded.of("NetworkPolicy"), ours(guarded)
    for mine in parties:
        for other in [*parties, *STRANGERS]:
            for port in MORE_PORTS:
                if passes(policies, "egress", mine, other, port, "TCP"):
                    assert (mine.name, other.name, port, "TCP") in wanted
                if passes(policies, "ingress", mine, other, port, "TCP"):
                    assert (other.name, mine.name, port, "TCP") in wanted


def test_a_pod_of_the_release_that_no_policy_names_is_shut_off(guarded: Rendered) -> None:
    labels = {"app.kubernetes.io/name": "lacre", "app.kubernetes.io/instance": "r", "app.kubernetes.io/component": "new"}
    new = Party("new", namespace=NAMESPACE, labels=labels, ours=True)
    for party in [*ours(guarded), *STRANGERS]:
        for port in MORE_PORTS:
            assert not reaches(guarded.of("NetworkPolicy"), new, party, port, "TCP")
            assert not reaches(guarded.of("NetworkPolicy"), party, new, port, "TCP")


def test_policies_can_be_left_out() -> None:
    assert not render("off").of("NetworkPolicy")


def test_the_evaluation_itself() -> None:
    """Without the policies everything is reached; without one of them, what it alone lets through is not."""
    chart = render("defaults")
    policies = chart.of("NetworkPolicy")
    gateway, worker, nats = (
        next(each for each in ours(chart) if each.name.startswith(n)) for n in ("gateway", "worker", "nats")
    )
    assert reaches([], STRANGERS[0], worker, 22, "TCP")
    assert reaches(policies, worker, nats, 4222, "TCP")
    assert not reaches(policies, worker, nats, 6222, "TCP")
    assert not reaches(policies, worker, gateway, 8321, "TCP")
    for gone in ("r-lacre-worker", "r-lacre-nats"):
        left = [each for each in policies if each["metadata"]["name"] != gone]
        assert not reaches(left, worker, nats, 4222, "TCP")
