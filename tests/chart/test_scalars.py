"""Names that YAML reads as numbers, truth values, nothing or dates: wherever the chart takes text, text comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chart.rendering import NPM, VALUES, Object, leaves, template
from chart.test_rendering import validated
from parts import strict_yaml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NPM is None, reason="npm, which Helm is fetched with, is not installed")]

# YAML 1.1 and 1.2 alike: integers of each base, floats, sexagesimal ones, truth values, nothing, dates.
ODD = (
    "123", "0123", "0x1f", "0o17", "0b1", "1e3", "1.5", "12e03", "190-0", "1-0", "true", "false", "on", "off", "yes", "no", "y",
    "n", "null", "nan", "inf", "2026-01-01", "1-2-3",
)  # fmt: skip
RELEASES = ("123", "0x1f", "1e3", "true", "null", "on", "n", "2026-01-01", "pr.7", "1.5", "0" * 44 + "lacre")


def odd_values(value: str) -> Object:
    """Every text that a user may choose freely, in all that the chart can make."""
    anywhere = {"podLabels": {"l": value}, "podAnnotations": {"a": value}, "nodeSelector": {"s": value}}
    account = {"serviceAccount": {"annotations": {"a": value}}, "priorityClassName": value}
    return {
        "image": {"tag": value, "registry": value, "pullSecrets": [{"name": value}]},
        "gateway": {**anywhere, **account, "secret": value, "tlsSecret": value, "audit": {"storageClass": value, "size": "10"}},
        "workers": {**anywhere, **account, "runtimeClassName": value, "secret": value, "keysSecret": value},
        "signer": {**anywhere, **account, "enabled": True, "secret": value, "state": {"storageClass": value, "size": "10"}},
        "nats": {"accountsSecret": value, "tlsSecret": value, "store": {"storageClass": value, "size": "10"}},
        "externalSecrets": {"store": {"name": value}, "prefix": value},
        "certManager": {"issuerRef": {"name": value}},
        "ingress": {"className": value, "host": value, "tlsSecret": value, "annotations": {"a": value}},
        "monitoring": {"serviceMonitor": {"labels": {"l": value}}, "dashboard": {"labels": {"l": value}}},
    }


def objects(folder: Path, values: Object, **how: str) -> list[Any]:
    file = folder / "odd.yaml"
    file.write_text(json.dumps(values))  # in which every text is quoted
    return strict_yaml.load_all(template(VALUES / "on.yaml", file, **how))


def texts(each: Object) -> dict[str, object]:
    """Of the fields that hold text alone: names of things, labels, annotations, images."""
    kept = re.compile(r"[nN]ame|image|class(Name)?|host|key$|^(l|a|s)$|kubernetes\.io|lacre/|helm\.sh|checksum", re.IGNORECASE)
    return {name: value for name, value in leaves(each) if kept.search(name)}


@pytest.mark.parametrize("value", ODD)
def test_text_stays_text(value: str, tmp_path: Path) -> None:
    found = objects(tmp_path, odd_values(value))
    wrong = {
        (each["kind"], name): text for each in found for name, text in texts(each).items() if not isinstance(text, str | None)
    }
    assert wrong == {}
    assert sum(text == value for each in found for text in texts(each).values()) > 20


@pytest.mark.parametrize("release", RELEASES)
def test_any_release_name_makes_things_that_kubernetes_takes(release: str, tmp_path: Path) -> None:
    found = objects(tmp_path, {}, release=release, namespace="123")
    assert validated(found)[:-1] == []
    for each in found:
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == release
        if each["kind"] == "Service":
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])  # RFC 1035


def test_pools_keep_their_names(tmp_path: Path) -> None:
    pools = ("1", "0x1f", "1e3", "true", "on", "n", "null", "2026-01-01")
    values = {"pools": {name: {} for name in pools}}
    found = objects(tmp_path, values)
    assert validated(found)[:-1] == []
    labels = [each["metadata"]["labels"] for each in found if each["kind"] == "Deployment"]
    assert {label.get("lacre/pool") for label in labels if "lacre/pool" in label} >= set(pools)
