"""nats-server three times over, one cluster: each is a process that may be killed, with its files in a folder of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos.network import Network
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.operate.leash import leashed
from lacre_fabric.operate.nats_server import MAX_FILES, MAX_MEMORY, executable


@dataclass
class MessageServer:
    """ports: for clients and for its peers."""

    name: str
    folder: Path
    log: Path
    network: Network
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
            "host": host,
            "port": self.ports[0],
            "server_name": self.name,
            "max_payload": MAX_PAYLOAD,
            "jetstream": {
                "store_dir": str(self.folder),
                "max_memory_store": MAX_MEMORY,
                "max_file_store": MAX_FILES,
                "sync_interval": "always",
            },
            "cluster": {
                "name": "chaos",
                "listen": f"{host}:{self.ports[1]}",
                "routes": [server.route for server in servers.values()],
                "ping_interval": "2s",  # a peer that says nothing is noticed in seconds
            },
            "ping_interval": "5s",
            "accounts": accounts(roles),
        }
        write_secret(self.folder / "nats.conf", json.dumps(config, indent=1).encode())

    def start(self) -> None:
        command = self.network.command(self.name, [executable(), "-c", str(self.folder / "nats.conf")])
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(leashed(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
