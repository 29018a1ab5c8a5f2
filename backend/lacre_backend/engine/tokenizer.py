"""A model's tokenizer, in its own process. `tokenizer_process` explains why, and the limits for a text.

Rules:
- The worker's own process tokenizes no text.
- A vocabulary that fails the trial of `tokenizer_process` is refused while the model loads, by name and cause.
- A text that crashes its process or exceeds its limits is refused alone (`TextRefused`). The worker and other texts continue.
- Short texts never wait for long ones. Few long texts run at a time, because each may take memory.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.ended import how as how_ended
from lacre_backend.engine.protocol import EngineClosed, EngineError, TextRefused
from lacre_backend.engine.tokenizer_process import (
    ADD_SPECIAL,
    COUNT,
    HEAD,
    LENGTH,
    NO_PROCESS,
    PARSE_SPECIAL,
    READY,
    UNREADABLE,
)

SHORT: Final = 16 * 1024  # bytes: even quadratic time takes only some tenths of a second for such a text
LONG_AT_ONCE: Final = 4  # each may take 256 MiB of stack, and 160 bytes per byte of its own
_IDLE: Final = 4  # connections kept for the next text; the fork behind each takes 2 MB
LOADING: Final = 180.0  # seconds; the process limits its own CPU time, and a cold disk takes longer
STALLED: Final = 60.0  # seconds without an answer. The process limits its CPU time itself, so this machine is overloaded
_PIECE: Final = 2**18  # bytes read from a connection at a time
_SAID: Final = 64 * 1024  # bytes of a failed process's output that are searched for causes
_CAUSE: Final = re.compile("ASSERT|error|what\\(\\)|Error")  # lines that name a cause
_CAUSE_LENGTH: Final = 400  # the last characters of those lines that are reported
_OPEN_FILES: Final = Path("/proc/self/fd")
_MODULE: Final = "lacre_backend.engine.tokenizer_process"
_NO_PROCESS: Final = "The tokenizer cannot start a process: raise the process limit or the memory of this host or container."
_NO_TIME: Final = "The tokenizer does not answer: this machine is overloaded. Try again later."

# The environment variables that the process gets: where libraries are. No secrets and no settings.
_KEPT: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR")
# It needs no GPU, and a fork must not inherit one.
_OWN: Final = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
    "GGML_NO_BACKTRACE": "1",  # ggml would start a debugger
    "OPENBLAS_NUM_THREADS": "1",  # forks do not work with threads
    "OMP_NUM_THREADS": "1",
}


class Tokenizer:
    """The tokenizer of one model's file. Any thread and any event loop may call any method."""

    def __init__(self, path: Path) -> None:
        """Starts the process, which takes a fifth of a second and the time to load the vocabulary. Raises SettingsError."""
        self._path = path
        self._lock = threading.Lock()  # for the fields below; never held for long, because event loops wait for it
        self._starting = threading.Lock()  # for starting the process, which takes a while
        self._closed = False
        self._process = _Process(path)
        self._idle: list[socket.socket] = []
        self._rooms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. No control token is recognized in it, and none is added around it.

        Raises TextRefused, or EngineError if the process ended and does not restart.
        """
        if not any(texts):
            return [[] for _ in texts]
        request = _request(texts, 0)
        if len(request) <= SHORT:
            return await self._asked(request, keep=True)
        async with self._room():
            return await self._asked(request, keep=False)

    def words(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of the program's own text, while its model loads. Blocks. Raises as `tokens`."""
        connection = self._idle_connection()
        if connection is None:
            connection = self._connection()
        connection.settimeout(STALLED)
        try:
            connection.sendall(_request([text], ADD_SPECIAL * add_special | PARSE_SPECIAL * parse_special))
            length = _length(_received(connection, LENGTH.size))
            (ids,) = _ids(_received(connection, length))
        except TimeoutError:
            connection.close()
            raise EngineError(_NO_TIME) from None
        except (OSError, EOFError):
            connection.close()
            raise TextRefused from None
        except EngineError:
            connection.close()
            raise
        self._keep(connection)
        return ids

    @property
    def pid(self) -> int:
        """The id of the process that holds the vocabulary."""
        return self._process.pid

    def forks(self) -> set[int]:
        """The processes that serve a text or wait for one."""
        return set(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    def close(self) -> None:
        """Ends the process, and every text in progress."""
        with self._starting:
            self._closed = True
            self._process.close()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    async def _asked(self, request: bytes, *, keep: bool) -> list[list[int]]:
        """keep: whether the process may serve another text; after a long one it holds memory."""
        while (connection := self._idle_connection()) is None:
            await asyncio.to_thread(self._open)  # into the idle ones, so that a caller who leaves now loses no connection
        answered = False
        try:
            connection.setblocking(False)
            async with asyncio.timeout(STALLED):
                await asyncio.get_running_loop().sock_sendall(connection, request)
                length = _length(await _read(connection, LENGTH.size))
                ids = _ids(await _read(connection, length))
            answered = True
        except TimeoutError:
            raise EngineError(_NO_TIME) from None
        except (OSError, EOFError):
            raise TextRefused from None
        finally:
            if answered and keep:
                self._keep(connection)
            else:
                connection.close()
        return ids

    def _room(self) -> asyncio.Semaphore:
        with self._lock:
            return self._rooms.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(LONG_AT_ONCE))

    def _idle_connection(self) -> socket.socket | None:
        """Skips connections whose process ended while idle, for example for lack of memory: the next text did not cause
        that.
        """
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if _waits(connection):
                return connection
            connection.close()

    def _open(self) -> None:
        """Adds a new connection to the idle ones. Raises as `_connection`."""
        connection = self._connection()
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()
        raise EngineClosed("The engine is closed.")

    def _keep(self, connection: socket.socket) -> None:
        with self._lock:
            if len(self._idle) < _IDLE and self._process.runs:
                self._idle.append(connection)
                return
        connection.close()

    def _connection(self) -> socket.socket:
        """A connection with a new fork of the process. If the process has ended, it is restarted once; no text can end it."""
        with self._starting:
            if self._closed:
                raise EngineClosed("The engine is closed.")
            try:
                return self._process.connect()
            except OSError:
                self._process.close()
            try:
                self._process = _Process(self._path)
                return self._process.connect()
            except (SettingsError, OSError):
                raise EngineError("The tokenizer's process does not restart. Check this host's memory.") from None


class _Process:
    """The process that holds the vocabulary. Raises SettingsError if it cannot load it, or crashes in the trial."""

    def __init__(self, path: Path) -> None:
        self.closed = False
        self._control, theirs = socket.socketpair()
        with theirs:
            surroundings = {name: os.environ[name] for name in _KEPT if name in os.environ}
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, os.fspath(path)],  # -P: no module of the current folder can replace it
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=surroundings | _OWN,
                pass_fds=_descriptors(path),
            )
        self._ending = weakref.finalize(self, _end, self._control, self._child)
        self._control.settimeout(LOADING)
        try:
            ready = self._control.recv(len(READY))
        except TimeoutError:
            self.close()
            raise SettingsError(f"{path}: its tokenizer did not load within {LOADING:.0f} s. Check the disk's speed.") from None
        if ready != READY:
            raise SettingsError(self._refusal(path))
        self._control.settimeout(STALLED)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def runs(self) -> bool:
        return not self.closed and self._child.poll() is None

    def connect(self) -> socket.socket:
        """Raises OSError if the process ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours

    def close(self) -> None:
        self.closed = True
        self._ending()

    def _refusal(self, path: Path) -> str:
        said = "" if self._child.stderr is None else self._child.stderr.read(_SAID).decode("utf-8", "replace")
        code = self._child.wait(STALLED)
        self.close()
        cause = "; ".join(line.strip() for line in said.splitlines() if _CAUSE.search(line))[-_CAUSE_LENGTH:]
        if code == UNREADABLE:
            return (
                f"llama.cpp cannot load {path}: {cause or 'it gives no reason'}. "
                "Check that the file is complete, and of an architecture that this llama.cpp supports."
            )
        ended = how_ended(code)
        return (
            f"The tokenizer of {path} cannot be used: its process ended with {ended} in the trial"
            f"{f' ({cause})' if cause else ''}. Convert the model again, with every byte in its vocabulary."
        )


def _descriptors(path: Path) -> tuple[int, ...]:
    """The open file that a path such as /proc/self/fd/7 names, which the child must then also have."""
    return (int(path.name),) if path.parent == _OPEN_FILES else ()


def _end(control: socket.socket, child: subprocess.Popen[bytes]) -> None:
    control.close()
    if child.stderr is not None:
        child.stderr.close()
    child.kill()
    child.wait()


def _request(texts: Sequence[str], flags: int) -> bytes:
    data = [text.encode() for text in texts]
    body = b"".join(part for text in data for part in (COUNT.pack(len(text)), text))
    return HEAD.pack(len(body), sum(map(len, data)), flags) + body


def _waits(connection: socket.socket) -> bool:
    """Whether the process behind an idle connection is alive. It sends nothing until it is asked."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _length(head: bytes) -> int:
    """The length of the answer that follows. Raises EngineError if no process was available."""
    (length,) = LENGTH.unpack(head)
    if length == NO_PROCESS:
        raise EngineError(_NO_PROCESS)
    return int(length)


def _ids(answer: bytes) -> list[list[int]]:
    found, at = [], 0
    while at < len(answer):
        (count,) = COUNT.unpack_from(answer, at)
        at += COUNT.size
        found.append(array("i", answer[at : at + 4 * count]).tolist())
        at += 4 * count
    return found


def _received(connection: socket.socket, size: int) -> bytes:
    """Raises EOFError if the process behind the connection ended."""
    data = bytearray()
    while len(data) < size:
        if not (piece := connection.recv(min(size - len(data), _PIECE))):
            raise EOFError
        data += piece
    return bytes(data)


async def _read(connection: socket.socket, size: int) -> bytes:
    """`_received`, without blocking."""
    loop, data = asyncio.get_running_loop(), bytearray()
    while len(data) < size:
        if not (piece := await loop.sock_recv(connection, min(size - len(data), _PIECE))):
            raise EOFError
        data += piece
    return bytes(data)
