"""All background work of a process: started here, known by name, and never dead in silence.

Rules:
- Lifetime work (`start`, `thread`) ends when its owner closes it. Any other end is a death, and is logged with its traceback.
  Then the process ends (`run`), or the work starts again (`Restart`, which says why that is safe).
- A library never ends its host process. Outside `run`, a death is logged, and the owner's next `check` raises it.
- Short work is a part of something. `spawn` returns it to its starter, who awaits it or ends it by `end`. `detach` is for work
  that is not awaited. Neither ends the process; an unexpected failure is logged, unless the starter took it by awaiting.
- A `LacreError` is expected. Any other exception is a fault of the code, and is logged.
- Waiting for work to end has a limit. Work that outlives its limit is logged and left behind.
- Nothing else in the project starts a task or a thread. `tests/test_architecture.py` checks that.

Work finds its group by context, which tasks and our threads inherit, as asyncio finds a running loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from lacre.errors import LacreError

GRACE: Final = 0.5  # seconds from a death to the forced end: a broken process must stop serving, but may end properly
END_LIMIT: Final = 5.0  # seconds for cancelled work to end: enough to close a connection, and no shutdown hangs on it
STATUS: Final = 70  # exit status after a forced end: EX_SOFTWARE of sysexits.h

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, None]]

LOGGER: Final = "lacre.runtime.tasks"  # the standard library's: each process decides what to do with its records
_log = logging.getLogger(LOGGER)


class TaskDied(LacreError):
    """Background work that must not end has ended. `__cause__` is its error; None if it just returned."""

    remedy = "Look in the log for the traceback, and report it: this is a fault of Lacre's code."


@dataclass(frozen=True, slots=True)
class Restart:
    """For work that may start again after a death. because: why nothing is lost by that.

    after: seconds until it starts again, doubled with each further death that follows soon, up to `most`.
    """

    because: str
    after: float = 1.0
    most: float = 60.0


class Group:
    """The work of one process, or of one library.

    At the first death, in any thread, alarm is called before the death is logged, because a log may be stuck; on_death after
    that.
    """

    def __init__(self, alarm: Callable[[], None] | None = None, on_death: Callable[[], object] | None = None) -> None:
        self._alarm = alarm
        self._on_death = on_death
        self._lock = threading.Lock()
        self.death: TaskDied | None = None
        # There is no process to end, or it is ending, and a loop may cancel the remaining work without logging it.
        self.over = on_death is None

    def unlock(self) -> None:
        """After a fork: no thread of the parent exists here to release the lock."""
        self._lock = threading.Lock()

    def died(self, name: str, error: BaseException | None) -> TaskDied:
        """Logs a death and tells the owner of the group. Later deaths are only logged."""
        death = TaskDied(f"the background work {name!r} ended: {'it returned' if error is None else type(error).__name__}")
        death.__cause__ = error
        with self._lock:
            first, self.death = self.death is None and not self.over, self.death or death
        if first and self._alarm is not None:
            self._alarm()
        _tell("background work died", name, error)
        if first and self._on_death is not None:
            self._on_death()
        return death


_LIBRARY: Final = Group()  # for work outside `run`
_group: ContextVar[Group] = ContextVar("lacre.runtime.tasks", default=_LIBRARY)
# Every piece of lifetime work in this process that has not ended, in the order of its start.
_register: dict[int, Background | Thread] = {}
_stack_size = threading.Lock()
_short: set[asyncio.Future[Any]] = set()  # asyncio itself keeps only weak references to tasks
_of_parents: list[Background | Thread] = []  # in a fork: they run in its parent, and a destructor must not report them


def _in_child() -> None:
    """A fork has none of its parent's threads and loops, and must not wait for a lock that one of them held."""
    global _stack_size  # noqa: PLW0603 - there is no other way to replace it
    _stack_size = threading.Lock()
    _LIBRARY.unlock()
    _of_parents.extend(_register.values())
    _register.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class Background:
    """Lifetime work on the running event loop. Made by `start`, closed by its owner."""

    def __init__(self, name: str, work: Work, restart: Restart | None) -> None:
        self.name = name
        self.restart = restart
        self.died: TaskDied | None = None
        self._work = work
        self._group = _group.get()
        self._closing = False
        self.task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._run(), name=name)
        _register[id(self)] = self
        self.task.add_done_callback(self._ended)

    @property
    def alive(self) -> bool:
        return not self.task.done()

    def check(self) -> None:
        """Raises TaskDied if the work has died."""
        if self.died is not None:
            raise self.died

    async def close(self, limit: float = END_LIMIT, *, patience: float = 0.0) -> None:
        """Cancels the work and waits until it has ended, for at most `limit` seconds.

        patience: seconds in which it may end by itself, before it is cancelled.
        """
        self._closing = True
        if patience > 0:
            await asyncio.wait({self.task}, timeout=patience)
        await end(self.task, limit=limit, expected=(_Died,))  # `_ended` logs its failure

    async def _run(self) -> None:
        if self.restart is None:
            return await self._once()
        delay = self.restart.after
        while True:
            began = time.monotonic()
            try:
                await self._once()
            except _Died as death:
                _tell("background work starts again", self.name, death.__cause__)
            if time.monotonic() - began > self.restart.most:
                delay = self.restart.after
            await asyncio.sleep(delay)
            delay = min(2 * delay, self.restart.most)

    async def _once(self) -> None:
        """Raises _Died, however the work ends."""
        try:
            await self._work()
        except asyncio.CancelledError as exc:
            if self.task.cancelling():
                raise
            raise _Died from exc  # something that it waited for was cancelled, not this work
        except Exception as exc:
            raise _Died from exc
        raise _Died

    def _ended(self, task: asyncio.Task[None]) -> None:
        _register.pop(id(self), None)
        if task.cancelled():
            if not (self._closing or self._group.over):
                self.died = self._group.died(self.name, asyncio.CancelledError())
            return
        error = task.exception()
        cause = error.__cause__ if isinstance(error, _Died) else error
        if not self._closing:
            self.died = self._group.died(self.name, cause)
        elif cause is not None and not isinstance(cause, LacreError):
            _tell("background work failed as it was closed", self.name, cause)


class _Died(Exception):
    """Lifetime work has ended: it raised the cause, or returned."""


class Thread:
    """Lifetime work in a thread of its own. It dies by raising; it may return once its owner told it to."""

    def __init__(self, name: str, target: Callable[[], None], stack: int) -> None:
        self.name = name
        self.restart: Restart | None = None
        self.died: TaskDied | None = None
        self._target = target
        self._group = _group.get()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name=name, daemon=True)
        _register[id(self)] = self
        with _stack_size:  # a setting of the process, which the next thread to start uses
            before = threading.stack_size(stack)
            try:
                self._thread.start()
            except RuntimeError:  # the system has no more threads
                _register.pop(id(self), None)
                raise
            finally:
                threading.stack_size(before)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        return self._thread.ident

    def check(self) -> None:
        """Raises TaskDied if the thread has died."""
        if self.died is not None:
            raise self.died

    def join(self, limit: float | None = None) -> bool:
        """Waits until it has ended, for at most `limit` seconds (None: no limit). Returns whether it has."""
        self._thread.join(limit)
        if self.alive:
            _tell("thread does not end", self.name, None)
        return not self.alive

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as exc:  # noqa: BLE001 - the one place where any death of a thread arrives
            self.died = self._group.died(self.name, exc)
        finally:
            _register.pop(id(self), None)


def start(name: str, work: Work, *, restart: Restart | None = None) -> Background:
    """Begins lifetime work on the running loop. work: makes the coroutine. Without `restart`, its death is final."""
    return Background(name, work, restart)


def thread(name: str, target: Callable[[], None], *, stack: int = 0) -> Thread:
    """Begins lifetime work in a thread. Work that `target` starts belongs to the same group. stack: bytes; 0: the system's
    size.
    """
    return Thread(name, target, stack)


def spawn(name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Begins a part of something. The starter awaits it, or ends it by `end`."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    _short.add(task)
    task.add_done_callback(_short.discard)
    return task


def detach(name: str, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
    """Begins short work that is not awaited. An unexpected failure is logged when it happens."""
    task: asyncio.Task[object] = spawn(name, work)
    task.add_done_callback(_tell_failure)
    return task


def across(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[T]:
    """Begins a part of something on another thread's loop. The starter awaits the result, or cancels it."""
    return asyncio.run_coroutine_threadsafe(work, loop)


async def end(*tasks: asyncio.Future[Any], limit: float = END_LIMIT, expected: tuple[type[Exception], ...] = ()) -> None:
    """Cancels tasks and waits until they have ended, for at most `limit` seconds. Their errors are not raised here.

    expected: failures that need no log, beside LacreError. A task that still runs after the limit is logged, and left.
    """
    for task in tasks:
        task.cancel()
    await settle(*tasks, limit=limit, expected=expected)


async def settle(*tasks: asyncio.Future[Any], limit: float, expected: tuple[type[Exception], ...] = ()) -> None:
    """As `end`, for tasks that are to end by themselves: none is cancelled."""
    if not tasks:
        return
    for task in tasks:
        task.add_done_callback(partial(_tell_failure, expected=expected))
    for task in (await asyncio.wait(tasks, timeout=limit))[1]:
        _tell("task does not end", _name(task), None)


async def together(*works: Awaitable[T]) -> list[T]:
    """The results of all, in order. The first that fails ends the others, and its error is raised."""
    group = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*group)
    finally:
        await end(*(task for task in group if not task.done()))


def failed(name: str, error: Exception) -> None:
    """Logs an unexpected failure that its owner survives on purpose: a check of foreign text that failed, for example."""
    _tell("a try failed", name, error)


def alive() -> tuple[Background | Thread, ...]:
    """The register: all lifetime work of this process, the first started first."""
    return tuple(_register.values())


async def run(main: Coroutine[Any, Any, T], *, grace: float = GRACE) -> T:
    """Runs a process's own coroutine. The death of any background work that it starts ends the process.

    Then `main` is cancelled, so that it ends properly, and TaskDied is raised. A process that still runs `grace` seconds after
    the death is ended by force, with status 70. Call it once, as the whole of the process.
    """
    loop = asyncio.get_running_loop()

    def alarm() -> None:
        threading.Thread(target=_end_by_force, args=(grace,), name="watchdog", daemon=True).start()

    group, context = Group(alarm, lambda: loop.call_soon_threadsafe(task.cancel)), copy_context()
    context.run(_group.set, group)
    task = loop.create_task(main, context=context)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:  # the caller's, such as Ctrl-C
        task.cancel()
        await asyncio.wait({task})
        if group.death is None:
            raise
    finally:
        group.over = True
    if group.death is not None:
        _tell_failure(task)
        raise group.death
    return task.result()


def _end_by_force(grace: float) -> None:
    time.sleep(grace)
    os._exit(STATUS)  # without a last flush, which could hang: handlers have already written their records


def _tell_failure(task: asyncio.Future[Any], expected: tuple[type[Exception], ...] = ()) -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, (LacreError, *expected)):
        _tell("task failed", _name(task), error)


def _name(task: asyncio.Future[Any]) -> str:
    return task.get_name() if isinstance(task, asyncio.Task) else "future"


def _tell(event: str, name: str, error: BaseException | None) -> None:
    """The event is constant, and the name is a field of the record: a formatter that drops arguments keeps both."""
    _log.error(event + ": %s", name, exc_info=error, extra={"task": name})
