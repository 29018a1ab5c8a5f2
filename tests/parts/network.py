"""A network namespace with one link to this host, and no way into it: iproute2 and nftables, as root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

# What the namespace takes: answers to what it asked for itself, and itself.
_NOTHING_IN = """
table inet lacre {
  chain input {
    type filter hook input priority 0; policy drop;
    iif "lo" accept
    ct state established,related accept
  }
}
"""


@dataclass(frozen=True)
class Namespace:
    """host: this machine's address on the link. address: the namespace's own."""

    name: str
    host: str
    address: str

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def close_the_way_in(self) -> None:
        subprocess.run(self.inside("nft", "-f", "-"), input=_NOTHING_IN, text=True, check=True)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """Skips the test where none can be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nft"):
        pytest.skip("a network namespace takes root, iproute2 and nftables")
    made, net = secrets.token_hex(3), f"198.18.{secrets.randbelow(256)}"  # RFC 2544: no network's own
    here, there = f"lc{made}a", f"lc{made}b"
    found = Namespace(f"lacre-{made}", f"{net}.1", f"{net}.2")
    if subprocess.run(["ip", "netns", "add", found.name], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a network namespace")
    try:
        for command in (
            f"ip link add {here} type veth peer name {there} netns {found.name}",
            f"ip addr add {found.host}/30 dev {here}",
            f"ip link set {here} up",
            f"ip -n {found.name} addr add {found.address}/30 dev {there}",
            f"ip -n {found.name} link set {there} up",
            f"ip -n {found.name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)
        yield found
    finally:
        subprocess.run(["ip", "netns", "del", found.name], check=True)  # and the link with it
