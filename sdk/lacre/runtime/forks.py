"""What a forked child must not share with its parent: connections, locks, and short-lived secrets.

`gunicorn --preload`, Celery and `multiprocessing` fork a process whose clients are in use, and the child has copies of them. If
the child used a connection, each process could read the other's answers. If another thread held a lock at the fork, it would
stay locked forever.

Rules:
- An object that holds such a thing is watched, and renewed in the child before any other code runs there.
- A child never ends, reads or writes its parent's connections. It drops their sockets without telling the peer.
- The child keeps the parent's objects, unused, until it ends: no destructor may touch what the parent still uses.

This is state of the process, because a fork copies the process: it is the only such list in the SDK.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from lacre.errors import UsageError

T = TypeVar("T")


class Forked(Protocol):
    """Something that a child must not use as its parent left it."""

    def after_fork(self) -> None:
        """Called in the child, while no other thread runs. It takes no lock and does not wait."""


_watched: Final[WeakSet[Forked]] = WeakSet()
_left: Final[list[object]] = []  # the parent's objects, kept so that no destructor runs


def watch(one: Forked) -> None:
    """From now on, each forked child calls `one.after_fork`, as long as something else refers to `one`."""
    _watched.add(one)


def leave(one: object) -> None:
    """In a child: keeps an object that only the parent uses."""
    _left.append(one)


_undivided: Final = threading.Lock()  # held during work that a fork must not interrupt


def _in_child() -> None:
    _undivided.release()
    for one in list(_watched):
        one.after_fork()


if hasattr(os, "register_at_fork"):  # without fork there is nothing to do
    os.register_at_fork(before=_undivided.acquire, after_in_parent=_undivided.release, after_in_child=_in_child)


class Undivided:
    """Work for once in a process and its forks, of some milliseconds: a fork waits for its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._done = False

    def __call__(self) -> None:
        if not self._done:
            with _undivided:
                if not self._done:
                    self._work()
                    self._done = True


class Home:
    """The process in which something was made; no other process may use it."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __bool__(self) -> bool:
        """Whether this is still that process."""
        return os.getpid() == self._pid

    def check(self, what: str) -> None:
        """Raises UsageError in any other process. what: names the thing, with a verb: "this answer is read"."""
        if not self:
            raise UsageError(f"{what} only by the process that asked for it, and this process is its fork: ask again here")


class PerProcess(Generic[T]):
    """One object for each process: a forked child makes its own when it first needs it.

    make: called here, and again in each child. renewable: False if the object holds something of the caller's that cannot be
    made again, such as an open connection.
    """

    def __init__(self, make: Callable[[], T], *, renewable: bool = True) -> None:
        self._make = make
        self._renewable = renewable
        self._lock = threading.Lock()
        self._one: T | None = make()
        watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        leave(self._one)
        self._one = None

    def get(self) -> T:
        """Raises UsageError in a child that cannot make its own."""
        with self._lock:
            if self._one is None:
                self._one = self._make() if self._renewable else _not_renewable()
            return self._one

    def made(self) -> list[T]:
        """The object that this process made, if it is still open."""
        return [] if self._one is None else [self._one]


class PerLoop(Generic[T]):
    """One object for each event loop of each process. See `PerProcess`; one that is not renewable serves all loops."""

    def __init__(self, make: Callable[[], T], *, renewable: bool = True) -> None:
        self._make = make
        self._renewable = renewable
        self._lock = threading.Lock()  # for loops of several threads
        self._spare: T | None = make()
        self._ours: WeakKeyDictionary[Any, T] = WeakKeyDictionary()
        watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        leave((self._spare, self._ours))
        self._spare, self._ours = None, WeakKeyDictionary()

    def get(self) -> T:
        """The running loop's own. Raises UsageError in a child that cannot make one."""
        from anyio.lowlevel import current_token  # noqa: PLC0415 - keeps `import lacre` fast

        if not self._renewable:
            return _not_renewable() if self._spare is None else self._spare
        loop = current_token().native_token
        with self._lock:
            if loop not in self._ours:
                spare, self._spare = self._spare, None
                self._ours[loop] = self._make() if spare is None else spare
            return self._ours[loop]

    def made(self) -> list[T]:
        """The objects of the running loop, and those of no loop."""
        from anyio.lowlevel import current_token  # noqa: PLC0415

        return [one for one in (self._spare, self._ours.get(current_token().native_token)) if one is not None]


def _not_renewable() -> NoReturn:
    raise UsageError("this client has a transport= of its own, which a fork cannot share: make the client in each process")


class Sockets:
    """The sockets of a client's connections, as httpcore's `trace` extension reports them."""

    def __init__(self) -> None:
        # the inode of each socket by its descriptor; the descriptor may be another file's by now
        self._known: dict[int, int] = {}
        watch(self)

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """A `trace` extension of httpcore. It notes each new stream of bytes."""
        if not event.endswith(_CONNECTED):
            return
        found = info["return_value"].get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is closed already
            descriptor = -1 if found is None else found.fileno()
            self._known[descriptor] = os.fstat(descriptor).st_ino

    def after_fork(self) -> None:
        """Drops the parent's sockets: as long as a child holds one, the peer does not see that the parent closed it.

        Each descriptor becomes one of /dev/null, so that it cannot become another file's, which a destructor would then close.
        """
        known, self._known = self._known, {}
        with contextlib.suppress(OSError):  # no descriptor is free: then the sockets stay, unused
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for descriptor, inode in known.items():
                with contextlib.suppress(OSError):  # it is closed already
                    if os.fstat(descriptor).st_ino == inode:
                        os.dup2(nothing, descriptor, inheritable=False)
            os.close(nothing)


_CONNECTED: Final = (".connect_tcp.complete", ".start_tls.complete", ".connect_unix_socket.complete")


class StaysInProcess:
    """An object that cannot be pickled or copied, and says why. _holds: the part that another process must not, or cannot,
    have.
    """

    _holds = "a token and connections"

    def __reduce_ex__(self, _protocol: object) -> Any:
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        raise UsageError(f"{name} cannot be pickled or copied: it holds {self._holds}. Make one in each process")
