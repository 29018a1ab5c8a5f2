"""Plays rendered pods on this machine: each container a process, each volume a folder, each port one of loopback.

What an image, a kubelet and DNS would bring is put in place of them: the interpreter that runs this for the images' own, a file
of authorities for the system's, paths of folders for where they would be mounted, `localhost` for a Service's name. Everything
else is as the chart says it: commands, arguments, environment, files and probes.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chart.rendering import Object, Pod, Rendered
from lacre_fabric.operate.nats_server import executable, free_port

PYTHON = "/opt/lacre/bin/python"
ENTRYPOINTS = {"lacre-gateway": "lacre_gateway", "lacre-worker": "lacre_backend"}  # the images', as the Dockerfile has them
PATIENCE = 60.0


def answers(host: str, port: int, asked: Object) -> bool:
    """Whether a probe by HTTP passes. asked: its `httpGet`."""
    context = ssl._create_unverified_context()  # a kubelet looks at no certificate either
    https = asked.get("scheme") == "HTTPS"
    to = http.client.HTTPSConnection(host, port, timeout=5, context=context) if https else None
    connection = to or http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", asked["path"])
        return 200 <= connection.getresponse().status < 400
    except OSError:
        return False
    finally:
        connection.close()


@dataclass
class Machine:
    """secrets: a folder for each Secret. claims: for each claim that the operator brings. hosts: Services' names.

    config_maps: those that the operator brings. system: the certificate authorities of the images; None: this machine's.
    """

    folder: Path
    chart: Rendered
    secrets: Mapping[str, Path]
    claims: Mapping[str, Path]
    hosts: tuple[str, ...]
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    system: Path | None = None
    ports: dict[int, int] = field(default_factory=dict)

    def port(self, port: int) -> int:
        """The one of loopback that stands for it, for every pod."""
        return self.ports.setdefault(port, free_port())

    def volume(self, pod: Pod, name: str) -> Path:
        """A folder with what the volume has. Claims are the same for all pods, everything else is each one's own."""
        source: Object = next((each for each in pod.spec["volumes"] if each["name"] == name), {})
        claim = source.get("persistentVolumeClaim", {}).get("claimName", "")
        if claim in self.claims:
            return self.claims[claim]
        if "secret" in source:
            return self.secrets[source["secret"]["secretName"]]
        at = self.folder / (claim or f"{pod.owner['metadata']['name']}-{name}")
        at.mkdir(exist_ok=True)
        return at

    def root(self, pod: Pod) -> Path:
        """What is mounted in the pod's containers lies below it, at its path."""
        return self.folder / f"{pod.owner['metadata']['name']}-root"

    def here(self, pod: Pod, container: Object, text: str) -> str:
        """What the container would read, with this machine's paths, names and ports."""
        for host in self.hosts:
            text = text.replace(host, "localhost")
        for port in sorted({*pod.ports.values(), 4222}):
            text = re.sub(rf"(?<!\d){port}\b", str(self.port(port)), text)
        paths = sorted((each["mountPath"] for each in container["volumeMounts"]), key=len, reverse=True)
        pattern = rf"(?<![\w/.])({'|'.join(map(re.escape, paths))})\b"
        text = re.sub(pattern, lambda match: f"{self.root(pod)}{match[1]}", text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def prepare(self, pod: Pod, container: Object) -> None:
        """Mounts the volumes, and writes the ConfigMaps' files."""
        volumes: Object = {each["name"]: each for each in pod.spec["volumes"]}
        for mount in sorted(container["volumeMounts"], key=lambda each: len(each["mountPath"])):
            at = Path(f"{self.root(pod)}{mount['mountPath']}")
            at.parent.mkdir(parents=True, exist_ok=True)
            files = dict(self.files(volumes.get(mount["name"], {})))
            if "subPath" in mount:
                at.write_text(self.here(pod, container, files[mount["subPath"]]))
            elif files:
                for name, content in files.items():
                    (at / name).parent.mkdir(parents=True, exist_ok=True)
                    (at / name).write_text(content)
            elif not at.exists():
                at.symlink_to(self.volume(pod, mount["name"]))

    def files(self, volume: Object) -> Iterator[tuple[str, str]]:
        """What its ConfigMaps have, by the paths in it."""
        for each in (volume, *volume.get("projected", {}).get("sources", ())):
            if "configMap" in each:
                name = each["configMap"]["name"]
                entries = self.config_maps.get(name) or self.chart.one("ConfigMap", name)["data"]
                chosen = each["configMap"].get("items") or [{"key": key, "path": key} for key in entries]
                yield from ((item["path"], entries[item["key"]]) for item in chosen)

    def command(self, pod: Pod, container: Object, environment: Mapping[str, str]) -> list[str]:
        image = container["image"].rpartition("/")[2].partition(":")[0]
        whole = container.get("command") or [PYTHON, "-P", "-m", ENTRYPOINTS[image]]
        whole = [*whole, *container.get("args", ())]
        whole = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], each) for each in whole]
        first = {PYTHON: sys.executable, "nats-server": executable()}[whole[0]]
        return [first, *(self.here(pod, container, each) for each in whole[1:])]

    def environment(self, pod: Pod, container: Object) -> dict[str, str]:
        """The container's own, and nothing of this machine's but where programs are."""
        name = f"{pod.owner['metadata']['name']}-0"
        known = {"metadata.name": name, "metadata.labels['apps.kubernetes.io/pod-index']": "0"}
        found = {"PATH": os.environ["PATH"]}
        if self.system is not None:
            found["SSL_CERT_FILE"] = str(self.system)  # where an image has a file; what the chart says comes after it
        for each in container.get("env", ()):
            value = each["value"] if "value" in each else known[each["valueFrom"]["fieldRef"]["fieldPath"]]
            found[each["name"]] = self.here(pod, container, value)
        return found

    def start(self, pod: Pod, container: Object) -> subprocess.Popen[bytes]:
        self.prepare(pod, container)
        environment = self.environment(pod, container)
        with (self.folder / f"{pod.component}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(pod, container, environment), env=environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def run(self, pod: Pod) -> None:
        """A Job's containers, one after the other, until they are done."""
        for container in pod.containers:
            assert self.start(pod, container).wait(PATIENCE) == 0, self.log(pod)

    def log(self, pod: Pod) -> str:
        return f"{pod.component}: " + (self.folder / f"{pod.component}.log").read_text(errors="replace")[-3000:]

    def await_probe(self, pod: Pod, name: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.passes(pod, pod.spec["containers"][0][name]):
            assert process.poll() is None, self.log(pod)
            assert time.monotonic() < deadline, f"{name}: {self.log(pod)}"
            time.sleep(0.2)

    def passes(self, pod: Pod, probe: Object) -> bool:
        (container,) = pod.containers
        if "exec" in probe:
            whole = [sys.executable, *(self.here(pod, container, each) for each in probe["exec"]["command"][1:])]
            assert probe["exec"]["command"][0] == PYTHON
            done = subprocess.run(whole, env=self.environment(pod, container), capture_output=True, check=False)
            return done.returncode == 0
        return answers("127.0.0.1", self.port(pod.ports[probe["httpGet"]["port"]]), probe["httpGet"])
