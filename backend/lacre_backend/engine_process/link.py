"""One child process, seen from the worker: starts it, passes messages, ends it.

Rules:
- One thread reads (`incoming`) and starts and ends the child. Any thread may send.
- Sending never waits: it may happen in an event loop. What the socket does not take at once, the reading thread sends later.
- The child inherits one socket, the log, and an allow-list of the environment: no secrets, no settings.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from lacre.wire.wiping import overwrite
from lacre_backend.engine.ended import how as how_ended
from lacre_backend.engine.protocol import EngineError, EngineLost
from lacre_backend.engine_process.messages import (
    FROM_CHILD,
    Answered,
    Forget,
    FromChild,
    ToChild,
    Unanswered,
    Unframer,
    framed,
    raised,
)

# Bytes that wait for a child which does not read: some of the largest requests. A child reads at once, unless it is stuck.
MAX_BACKLOG: Final = 256 * 2**20
LEAVE: Final = 2.0  # seconds for a child to end once its socket is closed: it frees its memory
TICK: Final = 1.0  # seconds between looks at a silent child
STALLED: Final = 120.0  # seconds for an answer that blocks its caller: longer than the child's own limits
_PIECE: Final = 2**18  # bytes read at a time
_MODULE: Final = "lacre_backend.engine_process.child"

# The environment variables that the child gets: where libraries are, how many threads they use, and which devices.
_KEPT: Final = ("PATH", "HOME", "TMPDIR", "TZ", "LANG", "VIRTUAL_ENV")
_KEPT_KINDS: Final = (
    "LC_", "LD_", "DYLD_", "PYTHON", "LLAMA_", "GGML_", "GOMP_", "OMP_", "KMP_", "OPENBLAS_", "MKL_", "MALLOC_", "CUDA_",
    "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCR_", "ROCM_", "ROCBLAS_", "ONEAPI_", "SYCL_", "ZE_", "VK_",
)  # fmt: skip


T = TypeVar("T")


class EngineLink:
    """A running child. Start it in a thread that lives longer: the child ends with that thread."""

    def __init__(self) -> None:
        """Raises OSError if the system starts no process."""
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        with theirs:
            command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), str(os.getpid())]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_KINDS)}
                | {"GGML_NO_BACKTRACE": "1"},  # ggml would start a debugger
                pass_fds=(theirs.fileno(),),
            )
        self.incoming = self._messages()
        self._ended: str | None = None
        self._lock = threading.Lock()  # for the fields below
        self._backlog = bytearray()
        self._over = False
        self._questions: dict[int, tuple[Future[Any], Callable[[Answered], Any] | None]] = {}
        self._numbers = itertools.count(1)
        self._forgotten: deque[int] = deque()  # appended to by destructors, which must not take the lock
        self._held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, message: ToChild, *, secret: bool = False) -> None:
        """secret: overwrite its bytes afterwards. Raises EngineLost if the child has ended, or EngineError if it is stuck."""
        data = framed(message)
        with self._lock:
            if self._over:
                raise EngineLost(begun=False)
            if len(self._backlog) + len(data) > MAX_BACKLOG:
                raise EngineError("The engine takes no more requests: its process does not read. Try again later.")
            if not secret:  # a longer array would move, and leave a copy of the secret
                data[:0] = self._forgetting()
            if not self._backlog:
                try:
                    sent = self._socket.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:  # it has just ended, and the reading thread will find out
                    raise EngineLost(begun=False) from None
                rest = data[sent:]
            else:
                rest = data
            if rest:
                self._backlog += rest
                self._rouse()
        if secret:
            overwrite(data)

    def ask(self, question: Callable[[int], ToChild]) -> Future[Answered]:
        """The answer to come. If its caller cancels it, the child stops working on it. Raises as `send`."""
        return self._ask(question, None)

    def obtain(self, question: Callable[[int], ToChild], stands: Callable[[Answered], T]) -> Future[T]:
        """As `ask`, for what the child then keeps. stands: makes the object for it here. Once that is collected, also if no
        one received it, the child forgets its own.
        """
        return self._ask(question, stands)

    def _ask(self, question: Callable[[int], ToChild], stands: Callable[[Answered], Any] | None) -> Future[Any]:
        number, future = next(self._numbers), Future[Any]()
        with self._lock:
            self._questions[number] = future, stands
        try:
            self.send(question(number))
        except BaseException:
            with self._lock:
                self._questions.pop(number, None)
            raise
        future.add_done_callback(lambda done: self._drop(number) if done.cancelled() else None)
        return future

    @staticmethod
    def wait(future: Future[T]) -> T:
        """The answer. Blocks. Raises the child's error, or EngineError if there is none in time."""
        try:
            return future.result(STALLED)
        except TimeoutError:
            future.cancel()
            raise EngineError("The engine's process does not answer: this machine is overloaded. Try again later.") from None

    def _hold(self, number: int, held: Any) -> None:
        """held: stands for what the child keeps by this number, until it is collected here."""
        self._held[number] = held
        weakref.finalize(held, self._forgotten.append, number).atexit = False

    def holds(self, number: int, held: object) -> bool:
        """Whether `held` is this child's."""
        return self._held.get(number) is held

    def kill(self) -> None:
        """Ends the child. Any thread may call it."""
        self._child.kill()

    # In the reading thread

    def _messages(self) -> Iterator[FromChild | None]:
        """What the child sends, as it comes. None: nothing more has come by now; at least each `TICK`. It ends with the child.

        Raises InvalidMessage: kill the child then.
        """
        unframer, poll, tidied = Unframer(FROM_CHILD), select.poll(), time.monotonic()
        poll.register(self._woken, select.POLLIN)
        while True:
            with self._lock:
                poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._backlog else 0))
            ready = dict(poll.poll(TICK * 1000))
            if (now := time.monotonic()) - tidied >= TICK:  # by the clock: the child is never silent for as long
                tidied = now
                self._tidy()
            if not ready:
                yield None
            if self._woken.fileno() in ready:
                self._slept()
            if (state := ready.get(self._socket.fileno(), 0)) & select.POLLOUT:
                self._flush()
            if state & ~select.POLLOUT:
                try:
                    data = self._socket.recv(_PIECE)
                except OSError:  # reset
                    return
                if not data:
                    return
                yield from unframer.feed(data)
                yield None

    def answer(self, message: Answered | Unanswered) -> None:
        """Passes an answer to the asker. Raises InvalidMessage."""
        error = raised(message.failure) if isinstance(message, Unanswered) else None
        with self._lock:
            asked = self._questions.pop(message.number, None)
        if asked is None:
            return  # its asker has gone, and the child was told
        future, stands = asked
        if not future.set_running_or_notify_cancel():
            self._forgotten.append(message.number)  # its asker left meanwhile, and could not find the question
        elif not isinstance(message, Answered):
            future.set_exception(error)
        elif stands is None:
            future.set_result(message)
        else:  # held before anyone receives it: a caller that is cancelled now never does
            held = stands(message)
            self._hold(message.number, held)
            future.set_result(held)

    def end(self) -> str:
        """Ends the child if it does not end by itself. Every question fails.

        Returns how it ended: a signal's name, or an exit code.
        """
        if self._ended is not None:
            return self._ended
        with self._lock:
            self._over = True
            self._backlog.clear()
            questions = list(self._questions.values())
            self._questions.clear()
        for future, _ in questions:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineLost(begun=True))
        try:
            code = self._child.wait(LEAVE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        for each in (self._socket, self._woken, self._wake):
            each.close()
        self._ended = how_ended(code)
        return self._ended

    def _drop(self, number: int) -> None:
        with self._lock:
            if self._questions.pop(number, None) is None:
                return
        self._forgotten.append(number)
        self._tidy()  # at once: the child may be at work on it

    def _forgetting(self) -> bytearray:
        """Tells the child what it need not keep."""
        numbers = []
        while self._forgotten:
            numbers.append(self._forgotten.popleft())
        return framed(Forget(tuple(numbers))) if numbers else bytearray()

    def _tidy(self) -> None:
        if self._forgotten:
            try:
                self.send(Forget(()))  # and with it what was forgotten
            except (EngineLost, EngineError):
                return

    def _rouse(self) -> None:
        try:
            self._wake.send(b".")
        except OSError:  # it is awake already
            return

    def _slept(self) -> None:
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            return

    def _flush(self) -> None:
        with self._lock:
            try:
                del self._backlog[: self._socket.send(self._backlog)]
            except OSError:  # full again, or the child has ended: then it will be read
                return
