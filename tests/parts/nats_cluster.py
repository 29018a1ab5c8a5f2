"""Three real nats-servers with TLS, as `examples/nats/node.conf` configures them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from lacre_fabric.accounts import accounts
from lacre_fabric.connection import Connection
from lacre_fabric.endpoints import Servers
from lacre_fabric.leash import leashed
from lacre_fabric.provisioning import provision
from lacre_fabric.roles import Credential, Role
from lacre_fabric.server import executable, free_port
from lacre_fabric.work import FabricUnavailable
from parts.certificates import DAY, Ca

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nats" / "node.conf"
START = 30.0  # seconds


class Node:
    """One server, in a folder of its own. conf: the text of its configuration."""

    def __init__(self, folder: Path, name: str, ca: Ca, roles: Sequence[Role], conf: str) -> None:
        folder.mkdir(parents=True)
        self.name, self.folder = name, folder
        self.port, self.route = free_port(), free_port()
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

    def start(self, peers: Sequence[Node]) -> None:
        environment = {
            "NODE": self.name,
            "CLIENTS": f"127.0.0.1:{self.port}",
            "ROUTES": f"127.0.0.1:{self.route}",
            "PEERS": f"[{', '.join(f'tls://127.0.0.1:{peer.route}' for peer in peers)}]",
            "STORE": str(self.folder / "store"),
        }
        with (self.folder / "log").open("ab") as log:
            command = leashed([executable(), "-c", "node.conf"])
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    async def listening(self) -> None:
        async with asyncio.timeout(START):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None


class NatsCluster:
    """Its nodes, whose certificates one CA has signed, and how clients reach them."""

    def __init__(
        self, folder: Path, roles: Sequence[Role], pools: Mapping[str, Sequence[str]], conf: str | None = None, size: int = 3
    ) -> None:
        self.ca = Ca(folder)
        self.pools = pools
        text = EXAMPLE.read_text() if conf is None else conf
        self.nodes = [Node(folder / f"n{number}", f"n{number}", self.ca, roles, text) for number in range(1, size + 1)]
        self.servers = Servers(tuple(node.url for node in self.nodes), ca=self.ca.file)

    def start(self) -> None:
        for node in self.nodes:
            node.start(self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    async def ready(self, provisioner: Credential, replicas: int = 3) -> None:
        """Until it is provisioned: servers find each other, and choose a leader, in their own time."""
        deadline = time.monotonic() + START
        while True:
            try:
                connection = await Connection.open(self.servers, provisioner)
                try:
                    return await provision(connection, self.pools, replicas=replicas)
                finally:
                    await connection.close()
            except FabricUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
