"""Helm renders the chart over the whole matrix of values, and what comes out has the form that Kubernetes takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from chart.rendering import CASES, CHART, NEEDED, ROOT, VALUES, Object, Rendered, helm, leaves, template
from parts import strict_yaml

pytestmark = pytest.mark.slow
VERSIONS = ("1.32", "1.34", "1.36")
OTHERS = {path.stem.rsplit("_", 1)[1] for path in (Path(__file__).parent / "schemas").glob("*.json")}


@cache
def validator() -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "environments.py", "chart"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def validated(objects: object) -> list[str]:
    """What is wrong, in the validator's words; and last, how much it looked at."""
    command = [validator(), Path(__file__).with_name("validate.py"), *VERSIONS]
    done = subprocess.run(command, input=json.dumps(objects), check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_lint(case: str) -> None:
    file = CASES[case]
    values = [part for each in (NEEDED, file) for part in ("--values", str(each))]
    done = subprocess.run([helm(), "lint", "--strict", str(CHART), *values], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schemas_of_kubernetes(chart: Rendered) -> None:
    assert validated(chart.objects) == [f"looked at {len(chart.objects)} for {len(VERSIONS)} versions"]


@cache
def kinds() -> str:
    helm()  # skips the test where there is no npm
    done = subprocess.run([sys.executable, ROOT / "tools" / "kinds.py"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def held_against_their_own(objects: object) -> list[str]:
    """The same for kinds of other projects, by the schemas that those publish. They let unknown members pass; ours do not."""
    command = ["node", Path(__file__).with_name("kinds") / "validate.mjs", kinds()]
    done = subprocess.run(command, input=json.dumps(objects), check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_the_schemas_of_others(chart: Rendered) -> None:
    theirs = [each for each in chart.objects if each["kind"] in OTHERS]
    assert held_against_their_own(theirs) == [f"looked at {len(theirs)}"]


def test_the_validator_of_others_can_say_no() -> None:
    scaled = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "a"}, "spec": {}}
    said = held_against_their_own([scaled, {**scaled, "kind": "Thing"}, {**scaled, "apiVersion": "keda.example/v1"}])
    assert ["scaleTargetRef" in said[0], *said[1:]] == [True, "Thing a: no schema", "ScaledObject a: no schema", "looked at 3"]


def test_every_kind_of_others_is_in_the_matrix() -> None:
    text = template(VALUES / "on.yaml")
    assert {kind for kind in OTHERS if f"kind: {kind}\n" in text} == OTHERS


def test_the_validator_can_say_no() -> None:
    good = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}}
    bad = {**good, "spec": {"port": 1}}
    unknown = {"apiVersion": "v9", "kind": "Thing", "metadata": {"name": "b"}}
    said = validated([good, bad, unknown])
    assert len(said) == 2 * len(VERSIONS) + 1


def test_names_and_labels_fit(chart: Rendered) -> None:
    for each in chart.objects:
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?", each["metadata"]["name"])  # CronJobs have 52
        for label in each["metadata"]["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", label)
    names = [(each["kind"], each["metadata"]["name"]) for each in chart.objects]
    assert len(names) == len(set(names))


def test_the_chart_is_of_this_version() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "sdk/lacre/_version.py").read_text())
    assert version is not None
    assert f"appVersion: {version[1]}\n" in (CHART / "Chart.yaml").read_text()


MISTAKES = {
    "a name that nobody knows": ("gatway.replicas=3", "additional properties 'gatway'"),
    "more instances than the credential is for": ("gateway.replicas=17", "maximum: got 17, want 16"),
    "a key that is none": ("trust=abc", "'/trust'"),
    "plain HTTP": ("publicUrl=http://lacre.example.com", "'/publicUrl'"),
    "two servers, which are no quorum": ("nats.replicas=2", "'/nats/replicas'"),
    "a secret in an address": ("nats.external.url=tls://user:word@nats", "'/nats/external/url'"),
    "two sources of one volume": ("workers.modelsVolume.nfs.server=a", "'/workers/modelsVolume': maxProperties"),
    "no root": ("trust=", "trust: the root key"),
    "no issuer": ("issuers=null", "issuers: whose tokens"),
    "autoscaling by nobody's metrics": ("workers.autoscaling.enabled=true", "monitoring.prometheus:"),
    "a KMS that no policy lets through": ("kms=awskms:///alias/a?region=b", "networkPolicy.kms:"),
    "NATS elsewhere, and not where": ("nats.enabled=false", "nats.external.url:"),
    "NATS elsewhere that no policy lets through": ("nats.enabled=false,nats.external.url=tls://n:4222", "nats.external.cidrs:"),
    "traces that no policy lets through": ("gateway.tracing.endpoint=http://collector:4318", "networkPolicy.collectors:"),
    "new keys that no worker would see": ("signer.rotateHours=24", "signer.rotateHours:"),
    "a route of no Gateway": ("gatewayApi.enabled=true", "gatewayApi.parentRefs:"),
    "a digest that is none": ("workers.digests.smollm2-135m.sha256={abc}", "/sha256/0"),
    "digests of a model that is not served": (
        "workers.digests.other.sha256={" + "a" * 64 + "}",
        "digests: the pool default has no model other",
    ),
    "a projector elsewhere than in a mount": (
        "workers.models[0].name=m,workers.models[0].path=/models/m.gguf,workers.models[0].projector=mmproj.gguf",
        "/models/0/projector",
    ),
    "alerts that no policy lets through": (
        "gateway.alerts.url=https://a.example,gateway.alerts.secret=s",
        "networkPolicy.webhooks:",
    ),
    "alerts that nobody signs": ("gateway.alerts.url=https://a.example", "'/gateway/alerts'"),
    "alerts in the clear": ("gateway.alerts.url=http://a.example,gateway.alerts.secret=s", "/gateway/alerts/url"),
    "an authority of alerts that nobody brings": (
        "gateway.alerts.url=https://a.example,gateway.alerts.secret=s,gateway.alerts.ca=/etc/lacre/issuers/b.pem,"
        "networkPolicy.webhooks[0].ipBlock.cidr=10.0.0.0/24",
        "gateway.alerts: /etc/lacre/issuers/b.pem is in no certificate",
    ),
    "a level of logs that nobody knows": ("gateway.logLevel=debug", "/gateway/logLevel"),
    "logs of no day": ("gateway.audit.logs.rotate_days=0", "/audit/logs/rotate_days"),
    "a route to no pool": (
        "routes.a.pools[0].pool=none,routes.a.pools[0].model=smollm2-135m",
        "routes: a: there is no model smollm2-135m in a pool none",
    ),
    "a route to no model": ("routes.a.pools[0].pool=default", "routes: a: there is no model a in a pool default"),
    "a private key of a signer": ("modelSigners.a=-----BEGIN PRIVATE KEY-----", "'/modelSigners/a'"),
    "no pool": ("pools.default=null", "pools: name at least one"),
    "a pool of models and of an upstream": (
        "pools.default.upstream.models[0].name=a,pools.default.upstream.models[0].allow={GET /},pools.default.models[0].name=a",
        "pools.default: it has either models or an upstream",
    ),
    "an upstream that no policy lets through": (
        "pools.default.upstream.origin=http://b.example,pools.default.upstream.models[0].name=a,"
        "pools.default.upstream.models[0].allow={GET /}",
        "networkPolicy.upstreams:",
    ),
    "rules without cases": ("gateway.policies=ours", "gateway.policyCases: name the cases"),
    "cases and none": (
        "gateway.policies=ours,gateway.policyCases.none=true,gateway.policyCases.allow={a.json}",
        "none: true says",
    ),
    "a case that is no key": ("gateway.policies=ours,gateway.policyCases.allow={cases/a.json}", "/policyCases/allow/0"),
    "an authority that nobody brings": (
        "issuers[0].issuer=https://a.example,issuers[0].audience=a,issuers[0].algorithms={ES256},issuers[0].ca=/etc/lacre/issuers/b.pem",
        "is in no certificate of issuerAuthorities",
    ),
    "a private key of an authority": ("issuerAuthorities.a=-----BEGIN PRIVATE KEY-----", "/issuerAuthorities/a"),
    "a public name without a certificate": ("ingress.enabled=true,ingress.host=a.example", "ingress.tlsSecret:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str) -> None:
    values, words = MISTAKES[mistake]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        template(CASES["defaults"], options=("--set", values))
    assert words in refused.value.stderr


# Names that YAML reads as numbers, truth values, nothing or dates: wherever the chart takes text, text comes out.


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
        "monitoring": {part: {"labels": {"l": value}} for part in ("serviceMonitor", "dashboard", "alerts")},
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
