"""A network for message servers, each in a namespace of its own, which can be cut off from the others and not from its clients.

It takes root and iproute2. Without them there is `Loopback`, on which nothing can be cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final, Protocol

_PREFIX: Final = f"lc{os.getpid() % 1_000_000}"  # names of devices have 15 characters at most


class Network(Protocol):
    """Where message servers are. partitions: whether they can be cut off."""

    partitions: bool

    def address(self, name: str) -> str: ...

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command`, to be run where `name` is; the process id stays what it is."""

    def cut(self, name: str) -> None:
        """No packet passes between `name` and its peers, in either direction; nobody is told."""

    def mend(self, name: str) -> None: ...

    def close(self) -> None: ...


class Loopback:
    """All at one address."""

    partitions = False

    def address(self, name: str) -> str:
        return "127.0.0.1"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def cut(self, name: str) -> None:
        raise NotImplementedError(f"{name} cannot be cut off from what is on the same loopback")

    def mend(self, name: str) -> None: ...

    def close(self) -> None: ...


class Namespaces:
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
            self._add(name)

    def _add(self, name: str) -> None:
        space, leg = self._space(name), f"{_PREFIX}{name}"
        _ip("netns", "add", space)
        _ip("link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", leg, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")

    @staticmethod
    def _space(name: str) -> str:
        return f"{_PREFIX}{name}"

    def address(self, name: str) -> str:
        return f"{self._net}.{self._names.index(name) + 1}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._space(name), *command]

    def cut(self, name: str) -> None:
        self._route("add", name)

    def mend(self, name: str) -> None:
        self._route("del", name)

    def _route(self, change: str, name: str) -> None:
        """Black holes at both ends, for each peer: what is sent is dropped, and connections hang as they do in the field."""
        for peer in self._names:
            if peer != name:
                _ip("-n", self._space(name), "route", change, "blackhole", f"{self.address(peer)}/32")
                _ip("-n", self._space(peer), "route", change, "blackhole", f"{self.address(name)}/32")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)


def network(names: Sequence[str]) -> Network:
    """The best that this machine has."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return Loopback()
    try:
        return Namespaces(names)
    except subprocess.CalledProcessError:
        return Loopback()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
