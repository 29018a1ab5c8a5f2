"""How many requests a client runs at once (`max_concurrency`): the others wait for their turn, in order.

Rules:
- A request holds its slot until its answer is read to the end, or left. A stream that stays open holds one.
- If a waiting call gives up, by a cancellation or Ctrl-C, it takes no slot; it passes on one that it got meanwhile.
- Waiting has no limit of its own, because the caller asked for it. A request's time limit begins when it is sent.
- A forked child begins with all slots free. Async clients count separately in each event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from lacre.runtime.forks import Home

if TYPE_CHECKING:
    import anyio


class _Turns(Protocol):
    def give(self) -> None: ...


class Slot:
    """One request's slot. turns: its source; None if nothing is counted."""

    __slots__ = ("_home", "_turns")

    def __init__(self, turns: _Turns | None = None) -> None:
        self._turns = turns
        self._home = Home()

    def leave(self) -> None:
        """Gives it to the call that has waited longest. Does nothing the second time, or in a forked child."""
        turns, self._turns = self._turns, None
        if turns is not None and self._home:
            turns.give()


class Turns:
    """The slots of a sync client. Thread-safe.

    A signal handler or the destructor of a stream may leave a slot. They run between any two steps of a thread, also within
    `take`, and must not wait for its lock.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()
        self._given: SimpleQueue[None] = SimpleQueue()  # its `put` may interrupt itself

    def take(self) -> Slot:
        """Waits for a slot."""
        mine = threading.Event()
        try:
            with self._lock:
                if self._free and not self._waiting:
                    self._free -= 1
                    mine.set()
                else:
                    self._waiting.append(mine)
            self._settle()
            mine.wait()
        except BaseException:
            self._withdraw(mine)
            raise
        return Slot(self)

    def _withdraw(self, mine: threading.Event) -> None:
        with self._lock:
            if mine in self._waiting:
                self._waiting.remove(mine)
            elif mine.is_set():
                self._given.put(None)
        self._settle()

    def give(self) -> None:
        self._given.put(None)
        self._settle()

    def _settle(self) -> None:
        """Passes on the returned slots. If another thread holds the lock, that thread does so when it releases it."""
        while not self._given.empty() and self._lock.acquire(blocking=False):
            try:
                self._hand_on()
            finally:
                self._lock.release()

    def _hand_on(self) -> None:
        with suppress(Empty):
            while True:
                self._given.get_nowait()
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._free += 1


class AsyncTurns:
    """The slots of an async client in one event loop."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[anyio.Event] = deque()

    async def take(self) -> Slot:
        """Waits for a slot."""
        if self._free and not self._waiting:
            self._free -= 1
            return Slot(self)
        from anyio import Event  # noqa: PLC0415 - keeps `import lacre` fast

        mine = Event()
        self._waiting.append(mine)
        try:
            await mine.wait()
        except BaseException:
            if mine.is_set():
                self.give()
            else:
                self._waiting.remove(mine)
            raise
        return Slot(self)

    def give(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
