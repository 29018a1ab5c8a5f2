"""A `Relay` on a loopback port, for clients that are processes of their own: in the test's loop, or in a thread beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx2
import uvicorn

from parts.certificates import Pair
from parts.relay import Relay


async def whole_body(receive: Any) -> bytes:
    body = b""
    while (message := await receive()).get("more_body"):
        body += message.get("body", b"")
    return body + message.get("body", b"")


@dataclass
class Gateway:
    """A relay on a loopback port. `before(i)` runs before the i-th piece of a sealed answer is sent, `after` when it was."""

    relay: Relay
    before: Callable[[int], Any] | None = None
    after: Callable[[], object] = lambda: None
    url: str = ""
    paths: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await whole_body(receive)
        self.paths.append(scope["path"])
        url = f"http://{scope['server'][0]}:{scope['server'][1]}{scope['path']}"
        response = await self.relay.answer(httpx2.Request(scope["method"], url, headers=scope["headers"], content=body))
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.headers.raw})
        pieces = [piece async for piece in response.aiter_raw()]
        for i, piece in enumerate(pieces):
            if self.before is not None and scope["path"] == "/v1/sealed":
                await self.before(i)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})
        self.after()


@contextlib.asynccontextmanager
async def serving(gateway: Gateway, pair: Pair | None = None) -> AsyncIterator[Gateway]:
    """pair: serves TLS with it."""
    files = {} if pair is None else {"ssl_certfile": pair.certificate, "ssl_keyfile": pair.key}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            gateway, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1, timeout_keep_alive=60, **files
        )
        server = uvicorn.Server(config)
        gateway.url = gateway.relay.url.replace("127.0.0.1:9", f"127.0.0.1:{listener.getsockname()[1]}")
        if pair is not None:
            gateway.url = gateway.url.replace("lacre+http://", "lacre://")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            try:
                yield gateway
            finally:
                server.should_exit = True
        for connection in list(server.server_state.connections):  # whose client was still there after a second
            connection.transport.abort()  # type: ignore[union-attr]  # it has one
        await asyncio.sleep(0)


@contextlib.contextmanager
def beside(gateway: Gateway, pair: Pair | None = None) -> Iterator[Gateway]:
    """Serves it in a thread, for tests that block. pair: over TLS."""
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving(gateway, pair):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    try:
        assert ready.wait(30)
        yield gateway
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(30)


def settings(gateway: Gateway, home: Path) -> dict[str, str]:
    """The environment of a process that uses it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "OPENAI_"))}
    return clean | {"LACRE_URL": gateway.url, "LACRE_TOKEN": "t0ken", "XDG_STATE_HOME": str(home)}
