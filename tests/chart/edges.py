"""NetworkPolicies, evaluated: whether one party reaches another at a port, in Kubernetes' terms.

A pod that no policy selects, in a direction, may do everything in it; one that is selected what some policy lets through. What
is not of the release is under no policy of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from chart.rendering import NAMESPACE, Object


@dataclass(frozen=True)
class Party:
    """A pod, or, without labels, an address. ours: a pod of the release."""

    name: str
    address: str = ""
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    ours: bool = False

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace}


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "nothing else is evaluated here"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def matches(peer: Object, party: Party) -> bool:
    """A peer of a rule. An address block is for what is no pod; a selector without a namespace for pods of ours."""
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return bool(party.address) and (
            ip_address(party.address) in ip_network(block["cidr"])
            and not any(ip_address(party.address) in ip_network(each) for each in block.get("except", ()))
        )
    if party.address:
        return False
    space = peer.get("namespaceSelector")
    if party.namespace != NAMESPACE if space is None else not selects(space, party.namespace_labels):
        return False
    return selects(peer.get("podSelector", {}), party.labels)


def passes(policies: Sequence[Object], way: str, of: Party, other: Party, port: int, protocol: str) -> bool:
    """way: ingress or egress, as `of` has it."""
    kind = way.capitalize()
    mine = [each["spec"] for each in policies if kind in each["spec"]["policyTypes"]]
    mine = [spec for spec in mine if selects(spec["podSelector"], of.labels)]
    return not mine or any(_through(rule, way, other, port, protocol) for spec in mine for rule in spec.get(way, ()))


def _through(rule: Mapping[str, Any], way: str, other: Party, port: int, protocol: str) -> bool:
    peers, ports = rule.get("from" if way == "ingress" else "to"), rule.get("ports")
    by_port = ports is None or any(each["port"] == port and each["protocol"] == protocol for each in ports)
    return by_port and (peers is None or any(matches(peer, other) for peer in peers))


def reaches(policies: Sequence[Object], source: Party, target: Party, port: int, protocol: str) -> bool:
    out = not source.ours or passes(policies, "egress", source, target, port, protocol)
    return out and (not target.ours or passes(policies, "ingress", target, source, port, protocol))


def like(peer: Object, name: str) -> Party:
    """Somebody whom the peer means."""
    if "ipBlock" in peer:
        hosts = ip_network(peer["ipBlock"]["cidr"])
        found = str(hosts[1] if hosts.num_addresses > 1 else hosts[0])
        return Party(name, address="203.0.113.9" if found == "0.0.0.1" else found)
    space = peer.get("namespaceSelector", {}).get("matchLabels", {})
    labels = peer.get("podSelector", {}).get("matchLabels", {"app": name})
    return Party(name, namespace=space.get("kubernetes.io/metadata.name", NAMESPACE), labels=labels)
