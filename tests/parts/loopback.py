"""A program that reaches one port of this machine's loopback, and no other address: it runs in a network namespace of its own.

    with only_loopback(port) as inside:
        subprocess.run(inside("codex", "exec", ...))  # reaches 127.0.0.1:PORT alone

`inside` runs `python -m parts.loopback` in the new namespace. That brings up the namespace's own loopback, listens there on
the same port, hands the listener out through a socket, and becomes the program. A thread out here joins what it accepts to
the real port. Takes util-linux and iproute2, and user namespaces that are allowed.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

_APART = ("unshare", "--map-root-user", "--net")
_TESTS = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def only_loopback(port: int) -> Iterator[Callable[..., list[str]]]:
    """Yields what a command becomes. Skips the test where no namespace can be made."""
    if not shutil.which("ip") or subprocess.run([*_APART, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("a network namespace takes iproute2, unshare, and a kernel that allows it")
    with tempfile.TemporaryDirectory(prefix="loopback-") as folder, _Bridge(f"{folder}/s", port) as bridge:
        yield lambda *command: [
            *_APART, "env", f"PYTHONPATH={_TESTS}", sys.executable, "-m", "parts.loopback", bridge.path, str(port), *command
        ]  # fmt: skip


class _Bridge:
    """Joins the listeners that programs hand over at `path` to the real port. Ends with its programs."""

    def __init__(self, path: str, port: int) -> None:
        self.path = path
        self._port = port
        self._door = socket.socket(socket.AF_UNIX)
        self._open = [self._door]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._door.bind(self.path)
        self._door.listen()
        self._run(self._welcome)
        return self

    def __exit__(self, *_error: object) -> None:
        for listener in self._open:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for listener in self._open:
            listener.close()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):  # the door was shut
            while True:
                with self._door.accept()[0] as program:
                    _, ancillary, _, _ = program.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
                [(_, _, packed)] = ancillary
                listener = socket.socket(fileno=array.array("i", packed)[0])
                self._open.append(listener)
                self._run(self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._run(self._join, listener.accept()[0])

    def _join(self, inner: socket.socket) -> None:
        with inner, socket.create_connection(("127.0.0.1", self._port)) as outer:
            back = threading.Thread(target=_pump, args=(outer, inner), daemon=True)
            back.start()
            _pump(inner, outer)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _inside(path: str, port: int, command: list[str]) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with socket.create_server(("127.0.0.1", port)) as listener, socket.socket(socket.AF_UNIX) as door:
        door.connect(path)
        handed = array.array("i", [listener.fileno()])
        door.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handed)])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    _inside(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
