"""Programs that fork, with clients that were in use before: python -m parts.forking NAME URL [CA]

Each prints what its processes saw, as JSON: for every call "ok", or the error. Children tell by a pipe. They end by `os._exit`,
but where the end is what is looked at.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import gc
import json
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2

import lacre
from lacre.runtime import tasks

CHILDREN, CALLS = 4, 10
SAID = "one two three"
Seen = collections.Counter[str]


def verdict(work: Callable[[], object]) -> str:
    try:
        return "ok" if work() in (SAID, None) else "another answer"
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return f"{type(exc).__name__}: {exc}"


class Child:
    """A fork that does `work`, and tells what it saw of each call. leaves: its end runs what a process runs at its end."""

    def __init__(self, work: Callable[[], list[str]], *, leaves: bool = False) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        self._reading = reading
        if self.pid:
            os.close(writing)
            return
        status = 1
        try:
            os.close(reading)
            os.write(writing, json.dumps(work()).encode())
            os.close(writing)
            status = 0
        finally:
            if not leaves:
                os._exit(status)
        gc.collect()
        sys.exit(0)

    def told(self) -> list[str]:
        with os.fdopen(self._reading, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        return json.loads(text) if status == 0 and text else [f"child ended with {status}"]


def calls(client: lacre.Client, number: int = CALLS) -> list[str]:
    return [verdict(lambda: client.chat("x").text) for _ in range(number)]


def in_threads(client: lacre.Client, threads: int = 4) -> list[str]:
    with ThreadPoolExecutor(threads) as pool:
        return [seen for each in pool.map(lambda _: calls(client, CALLS // 2), range(threads)) for seen in each]


@contextmanager
def busy(client: lacre.Client) -> Iterator[list[str]]:
    """Threads that call all the time, so that locks are held and answers under way when the process forks."""
    seen: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            seen.append(verdict(lambda: client.chat("x").text))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def plain(client: lacre.Client) -> list[str]:
    """One after another: a connection is kept alive, and every child has a copy of it."""
    seen = calls(client, 2)
    children = [Child(lambda: calls(client)) for _ in range(CHILDREN)]
    seen += calls(client)
    return seen + [each for child in children for each in child.told()]


def threads(client: lacre.Client) -> list[str]:
    """Forks in the middle of calls, six times; the children have threads too."""
    seen: list[str] = []
    with busy(client) as told:
        for _ in range(6):
            time.sleep(0.05)
            seen += Child(lambda: in_threads(client, 2)).told()
    return seen + told


def unused(client: lacre.Client) -> list[str]:
    """A client that was made before the fork, and used by nobody."""
    children = [Child(lambda: in_threads(client)) for _ in range(CHILDREN)]
    return [each for child in children for each in child.told()]


def generations(client: lacre.Client) -> list[str]:
    """The child of a child."""

    def child() -> list[str]:
        return [*calls(client, 2), *Child(lambda: calls(client, 2)).told(), *calls(client, 2)]

    return [*calls(client, 2), *Child(child).told(), *calls(client, 2)]


def leaving(client: lacre.Client) -> list[str]:
    """Children that close the client, or end as programs do: the parent's connection stays as it was."""
    seen = calls(client, 1)

    def closes() -> list[str]:
        seen = calls(client, 1)
        client.close()
        return seen

    for leaves in (False, True):
        seen += Child(closes, leaves=leaves).told()
        seen += calls(client, 1)
        seen += Child(lambda: [], leaves=leaves).told()
        seen += calls(client, 1)
    return seen


def stream(client: lacre.Client) -> list[str]:
    """An answer that is being read belongs to the parent. A child may drop it, or close it, but not read it."""
    answer = client.chat_stream("x")
    first = next(answer)

    def reads() -> list[str]:
        try:
            return ["".join(answer)]
        except lacre.UsageError as exc:
            return [type(exc).__name__]

    def closes() -> list[str]:
        answer.close()
        return calls(client, 1)

    told = [Child(work).told()[0] for work in (reads, closes)]
    return ["ok" if (told, first + "".join(answer)) == (["UsageError", "ok"], SAID) else str(told)]


def sockets(client: lacre.Client) -> list[str]:
    """The child holds no copy of the parent's connection: the peer sees that the parent closed it."""
    seen = calls(client, 1)
    pool = client._sealed._link.outer.get()._transport._pool  # type: ignore[attr-defined]
    [connection] = pool.connections
    held = connection._connection._network_stream.get_extra_info("socket")  # type: ignore[attr-defined]
    number = held.fileno()

    def look() -> list[str]:
        try:
            socket.socket(fileno=os.dup(number)).close()
        except OSError:
            return calls(client, 1)
        return ["the child has the parent's socket"]

    return seen + Child(look).told() + calls(client, 1)


def pools(client: lacre.Client) -> list[str]:
    """`multiprocessing` and `concurrent.futures`, which hand errors on by pickling them."""
    seen = calls(client, 1)
    _ours.append(client)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(CHILDREN) as pool:
        seen += [each for told in pool.map(_of_pool, range(CHILDREN * 2)) for each in told]
        try:
            pool.apply(_fails)
        except lacre.ApiError as exc:
            seen.append("ok" if (exc.code, exc.verification is not None) == (None, True) else repr(exc))
    with ProcessPoolExecutor(2, mp_context=fork) as executor:
        seen += [each for told in executor.map(_of_pool, range(4)) for each in told]
    return seen + calls(client, 1)


_ours: list[lacre.Client] = []


def _of_pool(_number: int) -> list[str]:
    return calls(_ours[0], 5)


def _fails() -> None:
    _ours[0].chat([])


def secrets(client: lacre.Client) -> list[str]:
    """Each process has a salt of its own: what it is, is told by its digest alone."""
    calls(client, 1)
    scope = client._sealed._sealing._scope_now
    salts = {scope().salt, *(Child(lambda: [scope().salt]).told()[0] for _ in range(2))}
    return ["ok" if len(salts) == 3 else f"{len(salts)} salts"]


def copied(client: lacre.Client) -> list[str]:
    asynchronous = lacre.AsyncClient(sys.argv[2], token="t", memory=lacre.VersionMemory())
    seen = []
    for one in (client, asynchronous, client.chat_stream("x"), asynchronous.chat_stream("x"), lacre.ProofKey.generate()):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            try:
                way(one)
            except lacre.UsageError as exc:
                seen.append("ok" if "in each process" in str(exc) else str(exc))
    return seen if len(seen) == 15 else ["it was copied"]


def given(_client: lacre.Client) -> list[str]:
    """A transport that the caller gave cannot be made anew: the child says so, and the parent goes on."""
    with lacre.Client(sys.argv[2], token="t", memory=lacre.VersionMemory(), transport=httpx2.HTTPTransport()) as client:
        seen = calls(client, 1)
        [told] = Child(lambda: calls(client, 1)).told()
        return [*seen, "ok" if told.startswith("UsageError: this client has a transport=") else told, *calls(client, 1)]


async def _asynchronous(client: lacre.AsyncClient, number: int = CALLS) -> list[str]:
    async def call() -> str:
        try:
            return "ok" if (await client.chat("x")).text == SAID else "another answer"
        except Exception as exc:  # noqa: BLE001 - whatever comes is told
            return f"{type(exc).__name__}: {exc}"

    return [*(await asyncio.gather(*(call() for _ in range(number)))), await call()]


def loops(_client: lacre.Client) -> list[str]:
    """An async client in the loop of a child, in two loops one after another, and in those of two threads."""
    client = lacre.AsyncClient(sys.argv[2], token="t", **options())

    def child() -> list[str]:
        return [*asyncio.run(_asynchronous(client)), *asyncio.run(_asynchronous(client))]

    async def parent() -> list[str]:
        seen = await _asynchronous(client)
        children = [Child(child) for _ in range(2)]
        seen += await _asynchronous(client)
        for each in children:
            seen += await asyncio.to_thread(each.told)
        return seen + await _asynchronous(client)

    seen = asyncio.run(parent()) + asyncio.run(parent())
    with ThreadPoolExecutor(2) as pool:
        seen += [each for told in pool.map(lambda _: asyncio.run(_asynchronous(client)), range(2)) for each in told]
    return seen


def forked_in_a_task(_client: lacre.Client) -> list[str]:
    """Forks while tasks of the loop have calls under way; the children end as programs do."""
    client = lacre.AsyncClient(sys.argv[2], token="t", **options())

    def child() -> list[str]:
        told: list[list[str]] = []
        thread = threading.Thread(target=lambda: told.append(asyncio.run(_asynchronous(client, 2))))
        thread.start()
        thread.join()
        return told[0]

    async def parent() -> list[str]:
        seen = await _asynchronous(client, 2)
        for _ in range(3):
            under_way = [asyncio.create_task(_asynchronous(client, 4)) for _ in range(2)]
            await asyncio.sleep(0.01)
            one = Child(child)
            for task in under_way:
                seen += await task
            seen += await asyncio.to_thread(one.told)
        seen += await _asynchronous(client, 2)
        await client.aclose()
        return seen

    return asyncio.run(parent())


def issued(_client: lacre.Client) -> list[str]:
    """A thread of the parent waits for a token server that never answers; the child asks by itself."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = lacre.ClientCredentials(f"http://127.0.0.1:{silent.getsockname()[1]}/token", "app", "s")
        client = lacre.Client(sys.argv[2], token=source, **options())
        threading.Thread(target=lambda: verdict(lambda: client.chat("x").text), daemon=True).start()
        accepted, _ = silent.accept()
        child = Child(lambda: [verdict(lambda: client.chat("x").text)])
        again, _ = silent.accept()  # the child's own connection
        again.close()
        [told] = child.told()
        accepted.close()
    return ["ok" if told.startswith("Unreachable") else told]


def remembered(_client: lacre.Client) -> list[str]:
    """A thread holds the memory's lock at the fork; the child ends later, and keeps nobody from it."""
    folder = lacre.trust.manifest_store.Path(sys.argv[3])
    memory = lacre.VersionFile(folder, patience=5)
    holds, over = threading.Event(), threading.Event()

    def decide(seen: Any) -> Any:
        holds.set()
        over.wait(30)
        return None, seen

    thread = threading.Thread(target=lambda: memory.update(decide))
    thread.start()
    holds.wait(30)
    reading, writing = os.pipe()
    child = Child(lambda: [str(len(os.read(reading, 1)))])
    over.set()
    thread.join()
    told = verdict(lambda: memory.update(lambda seen: (None, seen)))  # type: ignore[arg-type, return-value]
    os.write(writing, b"x")
    child.told()
    return [told]


def locked(client: lacre.Client) -> list[str]:
    """Every lock of a client is held by a thread at the fork."""
    memory = lacre.VersionMemory(patience=2)
    other = lacre.Client(sys.argv[2], token="t", **{**options(), "memory": memory}, max_concurrency=1)
    holders = [
        memory._lock, other._sealed._sealing._lock, other._sealed._link.flight._lock, other._sealed._link.outer._lock,
        client._sealed._sealing._lock, client._sealed._link.outer._lock,
    ]  # fmt: skip
    assert other._sealed._turns is not None
    slot = other._sealed._turns.get().take()
    for lock in holders:
        lock.acquire()
    child = Child(lambda: calls(other, 2) + calls(client, 2))
    for lock in holders:
        lock.release()
    slot.leave()
    return child.told() + calls(other, 1) + calls(client, 1)


def background(_client: lacre.Client) -> list[str]:
    """The parent's threads are not here, and a lock that one of them holds is not waited for."""
    over = threading.Event()
    thread = tasks.thread("parent's", lambda: bool(over.wait()) and None)

    def child() -> list[str]:
        before = tasks.alive()
        own = tasks.thread("child's", lambda: None)
        return ["ok" if own.join(10) and before == () else str(before)]

    with tasks._stack_size:
        one = Child(child)
    seen = one.told()
    here = [each.name for each in tasks.alive()]
    over.set()
    thread.join(10)
    return [*seen, "ok" if here == ["parent's"] else str(here)]


def options() -> dict[str, Any]:
    """Nothing is tried again: what goes wrong is seen."""
    verify = sys.argv[3] if len(sys.argv) > 3 and sys.argv[3].endswith(".pem") else True
    return {"memory": lacre.VersionMemory(), "verify": verify, "retries": 0, "resume": 0}


PROGRAMS = (plain, threads, unused, generations, leaving, stream, sockets, pools, secrets, copied, given, loops,
            forked_in_a_task, issued, remembered, background, locked)  # fmt: skip

if __name__ == "__main__":
    program = {each.__name__: each for each in PROGRAMS}[sys.argv[1]]
    with lacre.Client(sys.argv[2], token="t", **options()) as sealed:
        print(json.dumps(program(sealed)))
