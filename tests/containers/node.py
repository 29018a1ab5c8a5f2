"""Rendered pods for `podman kube play`, and what stands in the place of a cluster.

Images, commands, environment, probes, resources, security contexts, claims and paths are the chart's. Other than that:

- Controllers. A StatefulSet's pod gets its name, its index as a label, and its claim. A Job's containers are pods, one after
  the other: podman 4.3 waits 20 s after each init container.
- The kubelet. ConfigMaps and Secrets lie in folders of this machine, their files with the modes and the group that it would
  give: podman 4.3 takes no `subPath`, and makes each Secret's file readable for everybody. `$(NAME)` in arguments is replaced.
- Names. A pod's own volumes are called after it, for podman has one name space for all; its ports are some of loopback.
- The Service of a pod is an alias on the pods' network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import yaml

from chart.playing import answers
from chart.rendering import Object, Pod, Rendered
from lacre_fabric.operate.nats_server import free_port
from parts.containers import Engine, until

FOR_GROUP = 0o440  # what `fsGroup` adds to a file's mode


@dataclass(frozen=True, slots=True)
class Played:
    """A pod of one container, running. spec: the container's, as it was played. file: what was played."""

    engine: Engine
    name: str
    spec: Object
    file: Path

    @property
    def container(self) -> str:
        """podman's name for it."""
        return f"{self.name}-{self.spec['name']}"

    def inspect(self) -> Object:
        found: list[Object] = json.loads(self.engine.podman("inspect", self.container))
        return found[0]

    def status(self) -> dict[str, str]:
        """What the kernel says of its first process."""
        text = Path(f"/proc/{self.inspect()['State']['Pid']}/status").read_text()
        return dict(re.findall(r"^(\w+):\t(.*)$", text, re.MULTILINE))

    def port(self, name: str) -> int:
        """The one of loopback."""
        found: int = next(each["hostPort"] for each in self.spec["ports"] if each["name"] == name)
        return found

    def address(self) -> str:
        """Where other pods, and a kubelet, reach it."""
        infra = json.loads(self.engine.podman("pod", "inspect", self.name))["InfraContainerID"]
        networks = json.loads(self.engine.podman("inspect", infra))[0]["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def processes(self) -> set[Path]:
        """Of all its containers: the first, and the one that watches it."""
        containers = json.loads(self.engine.podman("pod", "inspect", self.name))["Containers"]
        states = [each["State"] for each in json.loads(self.engine.podman("inspect", *(each["Id"] for each in containers)))]
        numbers = {state.get(name, 0) for state in states for name in ("Pid", "ConmonPid")}
        return {Path(f"/proc/{number}") for number in numbers - {0}}

    def passes(self, probe: str) -> bool:
        asked = self.spec[probe]
        if "exec" in asked:
            return self.engine.succeeds("exec", self.container, *asked["exec"]["command"], within=asked["timeoutSeconds"])
        ports = {each["name"]: each["containerPort"] for each in self.spec["ports"]}
        return answers(self.address(), ports[asked["httpGet"]["port"]], asked["httpGet"])

    def await_probe(self, probe: str) -> None:
        until(lambda: self.passes(probe), f"{self.name}: {probe}", self.log)

    def log(self) -> str:
        return self.engine.logs(self.container)

    def exit_code(self) -> int:
        """Once it has ended by itself."""
        return int(self.engine.podman("wait", self.container))

    def down(self) -> None:
        self.engine.podman("kube", "down", str(self.file))


@dataclass(frozen=True, slots=True)
class Node:
    """folder: for what is mounted. secrets: each one's entries."""

    engine: Engine
    folder: Path
    chart: Rendered
    secrets: Mapping[str, Mapping[str, bytes]]

    def play(self, pod: Pod, *networks: str) -> Played:
        suffix = "-0" if pod.owner["kind"] == "StatefulSet" else ""
        (container,) = pod.containers
        return self._play(f"{pod.owner['metadata']['name']}{suffix}", pod, container, networks)

    def steps(self, job: Pod, *networks: str) -> list[Played]:
        """Each container of a Job, in a pod of its own; the next begins when one has ended well."""
        done = []
        for container in job.containers:
            step = self._play(f"{job.owner['metadata']['name']}-{container['name']}", job, container, networks)
            done.append(step)
            assert step.exit_code() == 0, f"{step.name}: {step.log()}"
        return done

    def _play(self, name: str, pod: Pod, container: Object, networks: Sequence[str]) -> Played:
        manifest = self._manifest(name, pod, container)
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(manifest))
        self.engine.podman("kube", "play", *(f"--network={each}" for each in networks), str(file))
        return Played(self.engine, name, manifest["spec"]["containers"][0], file)

    def _manifest(self, name: str, pod: Pod, container: Object) -> Object:
        owner, labels, played = pod.owner, dict(pod.labels), deepcopy(container)
        sources: dict[str, Object] = {each["name"]: each for each in pod.spec["volumes"]}
        if owner["kind"] == "StatefulSet":
            labels["apps.kubernetes.io/pod-index"] = name.rpartition("-")[2]
            for claim in (each["metadata"]["name"] for each in owner["spec"]["volumeClaimTemplates"]):
                sources[claim] = {"persistentVolumeClaim": {"claimName": f"{claim}-{name}"}}
        volumes = []
        for number, mount in enumerate(played["volumeMounts"]):
            source = sources[mount["name"]]
            mount["name"] = f"{name}-{number}"
            volumes.append({**self._source(pod, mount, source), "name": mount["name"]})
        for port in played.get("ports", ()):
            port |= {"hostIP": "127.0.0.1", "hostPort": free_port()}
        variables = _variables(name, labels, played)
        for part in ("command", "args"):
            if part in played:
                played[part] = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], each) for each in played[part]]
        spec = {key: value for key, value in pod.spec.items() if key != "initContainers"}
        spec |= {"containers": [played], "volumes": volumes}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}

    def _source(self, pod: Pod, mount: Object, source: Object) -> Object:
        """What a mount's volume is made from; a folder of this machine, or a file, where podman knows no such volume."""
        at = self.folder / mount["name"]
        if "secret" in source:
            entries = self.secrets[source["secret"]["secretName"]]
            chosen = {each["path"]: entries[each["key"]] for each in source["secret"].get("items", ())} or entries
            _lay(at, chosen, source["secret"].get("defaultMode", 0o644), pod.spec["securityContext"]["fsGroup"])
            return {"hostPath": {"path": str(at), "type": "Directory"}}
        if "configMap" in source:
            file = mount.pop("subPath")
            text = self.chart.one("ConfigMap", source["configMap"]["name"])["data"][file]
            _lay(at, {file: text.encode()}, 0o644, pod.spec["securityContext"]["fsGroup"])
            return {"hostPath": {"path": str(at / file), "type": "File"}}
        return source


def _lay(folder: Path, entries: Mapping[str, bytes], mode: int, group: int) -> None:
    folder.mkdir()
    for name, content in entries.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(mode | FOR_GROUP)
        os.chown(folder / name, 0, group)


def _variables(name: str, labels: Mapping[str, str], container: Object) -> dict[str, str]:
    known = {"metadata.name": name} | {f"metadata.labels['{label}']": value for label, value in labels.items()}
    return {
        each["name"]: each["value"] if "value" in each else known[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container.get("env", ())
    }
