"""Real nats-servers with TLS, as `examples/nats` configures them: three in a cluster, or one in each region."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.subjects import DEFAULT_REGION
from lacre_fabric.operate.nats_server import executable, free_port
from parts.certificates import DAY, Ca
from parts.stage.live import provisioned
from parts.stage.processes import launched
from parts.waiting import until

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nats" / "node.conf"
REGIONAL = EXAMPLE.with_name("region.conf")
START = 30.0  # seconds
_TLS_BLOCK = re.compile(r"^( *)tls \{\n(?:.*\n)*?\1\}\n", re.MULTILINE)


class Node:
    """One server, in a folder of its own. conf: the text of its configuration."""

    def __init__(
        self, folder: Path, name: str, ca: Ca, roles: Sequence[Role], conf: str, *, region: str = DEFAULT_REGION
    ) -> None:
        folder.mkdir(parents=True)
        self.name, self.folder, self.region = name, folder, region
        self.port, self.route, self.gate = free_port(), free_port(), free_port()
        self.url = f"tls://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.certify(ca)
        (folder / "ca.pem").write_bytes(ca.file.read_bytes())
        (folder / "node.conf").write_text(conf)
        self.tell(roles)

    def certify(self, ca: Ca, host: str = "127.0.0.1", until: timedelta = 30 * DAY) -> None:
        ca.issue(self.folder, "node", host, until)

    def tell(self, roles: Sequence[Role]) -> None:
        (self.folder / "accounts.json").write_text(json.dumps({"accounts": accounts(roles)}, indent=1))

    def start(self, peers: Sequence[Node], regions: Sequence[Node] = ()) -> None:
        """regions: one node of each region, where there are several."""
        gates = ", ".join(f"{{name: {node.region}, urls: [tls://127.0.0.1:{node.gate}]}}" for node in regions)
        routes = ", ".join(f"tls://127.0.0.1:{peer.route}" for peer in peers)
        environment = {
            "NODE": self.name, "REGION": self.region, "GATEWAYS": f"127.0.0.1:{self.gate}", "REGIONS": f"[{gates}]",
            "CLIENTS": f"127.0.0.1:{self.port}", "ROUTES": f"127.0.0.1:{self.route}", "PEERS": f"[{routes}]",
            "STORE": str(self.folder / "store"),
        }  # fmt: skip
        if regions:
            (self.folder / "region.conf").write_text(REGIONAL.read_text())
        command = [executable(), "-c", "region.conf" if regions else "node.conf"]
        self.process = launched(command, self.folder / "log", cwd=self.folder, env=os.environ | environment)

    async def listening(self) -> None:
        async def answers() -> bool:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return True
            return False

        await until(answers, START)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None


class NatsCluster:
    """Its nodes, whose certificates one CA has signed, and how clients reach them."""

    def __init__(
        self,
        folder: Path,
        roles: Sequence[Role],
        pools: Mapping[str, Sequence[str]],
        conf: str | None = None,
        size: int = 3,
        plain: bool = False,
    ) -> None:
        """plain: without TLS, for a test that is not about it: handshakes cost most of a small machine's time."""
        self.ca = Ca(folder)
        self.pools = pools
        text = EXAMPLE.read_text() if conf is None else conf
        text = _TLS_BLOCK.sub("", text) if plain else text
        self.nodes = [Node(folder / f"n{number}", f"n{number}", self.ca, roles, text) for number in range(1, size + 1)]
        for node in self.nodes if plain else ():
            node.url = f"nats://127.0.0.1:{node.port}"
        self.servers = Servers(tuple(node.url for node in self.nodes), ca=None if plain else self.ca.file)

    def start(self) -> None:
        for node in self.nodes:
            node.start(self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    async def ready(self, provisioner: Credential, replicas: int = 3) -> None:
        """Until it is provisioned: servers find each other, and choose a leader, in their own time."""
        await provisioned(self.servers, provisioner, self.pools, replicas=replicas)


VOTER = "vote"  # a place of one server that keeps nothing: with it, any one of two regions may be lost and most servers be left


class SuperCluster:
    """A region for each name, each of one server, the first the home; and a voter."""

    def __init__(
        self, folder: Path, roles: Sequence[Role], pools: Mapping[str, Sequence[str]], regions: Sequence[str] = ("eu", "us")
    ) -> None:
        self.ca = Ca(folder)
        self.pools, self.regions = pools, tuple(regions)
        text = EXAMPLE.read_text()
        self.nodes = {name: Node(folder / name, f"{name}-n1", self.ca, roles, text, region=name) for name in (*regions, VOTER)}

    def servers(self, region: str) -> Servers:
        return Servers((self.nodes[region].url,), ca=self.ca.file)

    def start(self, *regions: str) -> None:
        """All of them where none is named."""
        for region in regions or self.nodes:
            self.nodes[region].start([self.nodes[region]], list(self.nodes.values()))

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()

    async def ready(self, provisioner: Credential) -> None:
        """Until it is provisioned, from its home."""
        await provisioned(self.servers(self.regions[0]), provisioner, self.pools, regions=self.regions)
