"""nats-server three times over, one cluster: each is a process that may be killed, with its files in a folder of its own.

Each may be in a network namespace of its own, which can be cut off from the others and not from its clients. That takes root
and iproute2. Without them there is `Loopback`, on which nothing can be cut.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.operate.nats_server import MAX_FILES, MAX_MEMORY, executable
from parts.stage.processes import launched

_PREFIX: Final = f"lc{os.getpid() % 1_000_000}"  # names of devices have 15 characters at most


class Loopback:
    """All at one address. partitions: whether they can be cut off from each other."""

    partitions = False

    def address(self, name: str) -> str:
        return "127.0.0.1"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command`, to be run where `name` is; the process id stays what it is."""
        return list(command)

    def cut(self, name: str) -> None:
        """No packet passes between `name` and its peers, in either direction; nobody is told."""
        raise NotImplementedError(f"{name} cannot be cut off from what is on the same loopback")

    def mend(self, name: str) -> None: ...

    def close(self) -> None: ...


class Namespaces(Loopback):
    """A bridge on this host, and a namespace for each name with a leg on it."""

    partitions = True

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._net = f"10.213.{os.getpid() % 254 + 1}"
        self._bridge = f"{_PREFIX}b"
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name in names:
            space = leg = f"{_PREFIX}{name}"
            _ip("netns", "add", space)
            _ip("link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", leg, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")

    def address(self, name: str) -> str:
        return f"{self._net}.{self._names.index(name) + 1}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", f"{_PREFIX}{name}", *command]

    def cut(self, name: str) -> None:
        self._route("add", name)

    def mend(self, name: str) -> None:
        self._route("del", name)

    def _route(self, change: str, name: str) -> None:
        """Black holes at both ends, for each peer: what is sent is dropped, and connections hang as they do in the field."""
        for peer in self._names:
            for here, there in ((name, peer), (peer, name)) if peer != name else ():
                _ip("-n", f"{_PREFIX}{here}", "route", change, "blackhole", f"{self.address(there)}/32")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", f"{_PREFIX}{name}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)


def network(names: Sequence[str]) -> Loopback:
    """The best that this machine has."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return Loopback()
    try:
        return Namespaces(names)
    except subprocess.CalledProcessError:
        return Loopback()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class MessageServer:
    """ports: for clients and for its peers."""

    name: str
    folder: Path
    log: Path
    network: Loopback
    ports: tuple[int, int]
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"nats://{self.network.address(self.name)}:{self.ports[0]}"

    @property
    def route(self) -> str:
        return f"nats://{self.network.address(self.name)}:{self.ports[1]}"

    def configure(self, roles: Sequence[Role], servers: Mapping[str, MessageServer]) -> None:
        self.folder.mkdir(parents=True)
        host = self.network.address(self.name)
        config = {
            "host": host, "port": self.ports[0], "server_name": self.name, "max_payload": MAX_PAYLOAD,
            "jetstream": {
                "store_dir": str(self.folder), "max_memory_store": MAX_MEMORY, "max_file_store": MAX_FILES,
                "sync_interval": "always",
            },
            "cluster": {
                "name": "chaos", "listen": f"{host}:{self.ports[1]}", "routes": [server.route for server in servers.values()],
                "ping_interval": "2s",  # a peer that says nothing is noticed in seconds
            },
            "ping_interval": "5s",
            "accounts": accounts(roles),
        }  # fmt: skip
        write_secret(self.folder / "nats.conf", json.dumps(config, indent=1).encode())

    def start(self) -> None:
        command = self.network.command(self.name, [executable(), "-c", str(self.folder / "nats.conf")])
        self.process = launched(command, self.log)
