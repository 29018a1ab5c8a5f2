"""Images built and containers run with buildah and podman, in a storage of their own that is gone afterwards.

Rules
- What a machine needs to reach package registries (certificates, settings of pip and apt) is mounted for the build, and is in
  no image.
- What runs is `deploy/compose.yaml`: each key of a service becomes an option of podman, and one that is not known here fails.
- It works without systemd, and where only runc does: no cgroups of podman's own, limits that need no privilege to set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from parts.waiting import PATIENCE, wait_until

REMOVALS = 10  # tries, a second apart

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = ROOT / "deploy" / "compose.yaml"
TOOLS = ("buildah", "podman", "runc", "mmdebstrap", "iptables", "catatonit")
BASE = "localhost/lacre-base"
NOBODY = 65532  # the images' user
ANSWERS_WITHIN = 120.0  # seconds: podman, which waits for ever for a container that ends and restarts all the time
PYTHON = "/opt/lacre/bin/python"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
APT_SETTINGS = Path("/etc/apt/apt.conf.d")
SOURCES = [Path("/etc/apt/sources.list.d") / f"{name}.sources" for name in ("debian", "ubuntu")]
PIP_SETTINGS = ("cert", "index-url", "extra-index-url", "proxy", "trusted-host", "default-timeout", "timeout")

STORAGE = """[storage]
driver = "{driver}"
runroot = "{folder}/run"
graphroot = "{folder}/graph"
"""
SETTINGS = """[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
tmp_dir = "{folder}/tmp"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=1024:1024"]
log_driver = "k8s-file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""


def missing() -> str | None:
    """Why this machine cannot build and run containers; None where it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (.ci/run names the Debian packages)"
    return None if os.geteuid() == 0 else "a base image is made as root here"


def tell(line: str) -> None:
    print(f"\n{line}", end="", flush=True)


def until(true: Callable[[], bool], what: str, log: Callable[[], str] = str) -> None:
    wait_until(true, PATIENCE, lambda: f"{what} is not ready\n{log()}")


class Images(NamedTuple):
    gateway: str
    worker: str
    nats: str


@dataclass(frozen=True, slots=True)
class Engine:
    """folder: where all of it is kept."""

    folder: Path

    def podman(self, *arguments: str, check: bool = True) -> str:
        """What it prints. A failure shows what it said."""
        return self._run("podman", *arguments, check=check, within=ANSWERS_WITHIN).stdout.strip()

    def succeeds(self, *arguments: str, within: float = ANSWERS_WITHIN) -> bool:
        """Also that it answers in time, in seconds."""
        try:
            return self._run("podman", *arguments, check=False, within=within).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def logs(self, container: str) -> str:
        """Its last lines, of both streams."""
        done = self._run("podman", "logs", "--tail=20", container, check=False, within=ANSWERS_WITHIN)
        return done.stdout + done.stderr

    def _run(self, *command: str, check: bool = True, within: float | None = None) -> subprocess.CompletedProcess[str]:
        own = {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
        }
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | own, timeout=within)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def make_base(self) -> None:
        """A minimal Debian with Python, from where this machine gets its own packages."""
        suite = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.MULTILINE)
        assert suite
        sources = [str(path) for path in SOURCES if path.exists()] or ["/etc/apt/sources.list"]
        archive = self.folder / "base.tar"
        include = "--include=python3,python3-venv"
        self._run("mmdebstrap", "--quiet", "--variant=minbase", include, suite[1], str(archive), *sources)
        self.podman("import", "--quiet", str(archive), BASE)
        archive.unlink()

    def build(self, target: str, wheels: Path) -> str:
        """The image's name. wheels: the folder with llama-cpp-python's."""
        mounts = [f"{wheels}:/wheels:ro", f"{self._pip_settings()}:/etc/pip.conf:ro"]
        mounts += [f"{path}:{path}:ro" for path in (CERTIFICATES, APT_SETTINGS) if path.exists()]
        image = f"localhost/lacre-{target}"
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        arguments = {"BASE_IMAGE": BASE, "VERSION": "0.test", "REVISION": revision}
        options = [f"--volume={mount}" for mount in mounts]
        options += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        options += ["--isolation=chroot", "--format=docker", "--layers", "--timestamp=0"]
        self._run("buildah", "bud", *options, f"--target={target}", f"--tag={image}", str(ROOT))
        return image

    def _pip_settings(self) -> Path:
        """pip's settings as they count here, without what names files of this machine."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
        lines = [f"{name} = {found[name]}" for name in PIP_SETTINGS if name in found and "file:" not in found[name]]
        path = self.folder / "pip.conf"
        path.write_text("\n".join(["[global]", *lines, ""]))
        return path

    def build_nats(self, server: Path) -> str:
        """An image of the message server and nothing else. server: its executable, which needs no library."""
        context = self.folder / "nats"
        context.mkdir()
        shutil.copy(server, context / "nats-server")
        (context / "Dockerfile").write_text('FROM scratch\nCOPY nats-server /bin/\nENV PATH=/bin\nENTRYPOINT ["nats-server"]\n')
        image = "localhost/lacre-nats"
        self._run("buildah", "bud", "--isolation=chroot", "--format=docker", f"--tag={image}", str(context))
        return image

    def layers(self, image: str) -> list[tuple[int, str]]:
        """Bytes and origin of each layer that holds something, the base first."""
        history = json.loads(self.podman("history", "--format=json", "--no-trunc", image))
        return [(row["size"], row["CreatedBy"] or "base") for row in reversed(history) if row["size"]]

    def inspect(self, image: str) -> Mapping[str, Any]:
        found: list[Mapping[str, Any]] = json.loads(self.podman("image", "inspect", image))
        return found[0]


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Everything that was made goes when it ends, also where something failed."""
    driver = "overlay" if _overlays(folder) else "vfs"
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder, driver=driver))
    (folder / "containers.conf").write_text(SETTINGS.format(folder=folder))
    made = Engine(folder)
    try:
        yield made
    finally:
        made.podman("pod", "rm", "--all", "--force", "--time=1", check=False)
        made.podman("rm", "--all", "--force", "--time=1", check=False)
        made.podman("network", "prune", "--force", check=False)
        _remove(folder)  # the images with it


def _remove(folder: Path) -> None:
    """Podman tidies up after each container in a process of its own, which may mount the storage once more."""
    for left in reversed(range(REMOVALS)):
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder}/")]):
            subprocess.run(["umount", mount], check=not left)
        try:
            shutil.rmtree(folder)
            return
        except OSError:
            if not left:
                raise
        time.sleep(1)


def _overlays(folder: Path) -> bool:
    """Whether layers can be mounted over each other here; not where the folder is on such a mount itself."""
    lower, upper, work, merged = (folder / "try" / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        return False
    subprocess.run(["umount", merged], check=True)
    return True


class Deployment:
    """The services of compose.yaml. variables: what a shell would have set."""

    def __init__(self, engine: Engine, variables: Mapping[str, str]) -> None:
        self._engine = engine
        text = re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda found: self._value(variables, found), COMPOSE.read_text())
        content = yaml.safe_load(text)
        self.services: Mapping[str, Mapping[str, Any]] = content["services"]
        for name, network in content["networks"].items():
            assert network.keys() <= {"internal"}
            engine.podman("network", "create", *(["--internal"] if network.get("internal") else []), name)

    @staticmethod
    def _value(variables: Mapping[str, str], found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        assert name in variables or kind == "-", f"{name}: {rest}"
        return variables.get(name, rest)

    def once(self, service: str, *command: str) -> str:
        """Runs the service, or another command in its place, to its end. What it prints."""
        return self._engine.podman("run", "--rm", *self._options(service), *(command or self.services[service]["command"]))

    def start(self, service: str) -> float:
        """Begins the service; the time at which it did, of `time.monotonic`."""
        options, command = self._options(service), self.services[service].get("command", ())
        self._engine.podman("create", f"--name={service}", *options, *command)
        began = time.monotonic()
        self._engine.podman("start", service)
        return began

    def _options(self, service: str) -> Sequence[str]:
        keys = dict(self.services[service])
        for unused in ("command", "profiles", "depends_on"):
            keys.pop(unused, None)
        image = keys.pop("image")
        return [option for key, value in keys.items() for option in _option(key, value)] + [image]


# A key of compose.yaml in podman's words; of a list, for each item.
_OPTIONS: Mapping[str, Callable[[Any], list[str]]] = {
    "user": lambda name: [f"--user={name}"],
    "read_only": lambda value: [f"--read-only={json.dumps(value)}", "--read-only-tmpfs=false"],
    "cap_drop": lambda name: [f"--cap-drop={name}"],
    "security_opt": lambda name: [f"--security-opt={name.removesuffix(':true')}"],
    "tmpfs": lambda mount: [f"--tmpfs={mount}"],
    "volumes": lambda mount: [f"--volume={mount}"],
    "ports": lambda port: [f"--publish={port}"],
    "networks": lambda name: [f"--network={name}"],
    "network_mode": lambda mode: [f"--network={mode}"],
    "entrypoint": lambda command: [f"--entrypoint={json.dumps(command)}"],
    "stop_grace_period": lambda time: [f"--stop-timeout={time.removesuffix('s')}"],
    "restart": lambda policy: [] if policy == "no" else [f"--restart={policy}"],
    "healthcheck": lambda _disabled: ["--no-healthcheck"],
}


def _option(key: str, value: Any) -> list[str]:
    assert key in _OPTIONS and (key != "healthcheck" or value == {"disable": True}), f"compose.yaml: {key} is not known here"
    each = value if isinstance(value, list) and key != "entrypoint" else [value]
    return [option for item in each for option in _OPTIONS[key](item)]
