"""The npm package `lacre` in Node, asked once by tests/interop/ask.mjs against a relay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2

from lacre.wire.header import Kem
from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.relay import SEALED, Relay, served

INTEROP = Path(__file__).resolve().parent.parent / "interop"
KEMS = {"xwing": Kem.XWING, "x25519": Kem.X25519}
NODE = shutil.which("node")
NPM = shutil.which("npm")
FORBIDDEN = "urn:lacre:problem:forbidden"


@dataclass
class Ran:
    """What the client said, and what came to the gateway. error: `{}` for none."""

    code: int
    pieces: list[str]
    totals: dict[str, Any] | None
    error: dict[str, Any]
    gateway: Gateway

    @property
    def paths(self) -> list[str]:
        return self.gateway.paths


def environment(url: str) -> dict[str, str]:
    passed = {name: os.environ[name] for name in ("PATH", "XDG_STATE_HOME")}
    return passed | {"LACRE_URL": url, "LACRE_TOKEN": "t0ken"}


def command(options: dict[str, Any] | None = None, body: dict[str, Any] | None = None) -> list[str]:
    return [str(NODE), "ask.mjs", json.dumps(options or {}), json.dumps(body or {}), "How many Baltic states?"]


ONCE = {"retries": 0, "resume": 0}


async def chat(
    options: dict[str, Any] | None = None,
    body: dict[str, Any] | None = None,
    *,
    app: Any = None,
    before: Any = None,
    url: Callable[[str], str] = str,
    kem: str = "",
    **relay: Any,
) -> Ran:
    """One call of the package. url: what it makes of the gateway's. kem: the one of the pool, and of the client."""
    usual = {"kem": KEMS[kem]} if kem else {}
    options = (options or {}) | ({"kems": [kem]} if kem else {})
    async with serving(Gateway(Relay(app or ChatApp(), **usual, **relay), before)) as gateway:
        done = await anyio.run_process(command(options, body), cwd=INTEROP, env=environment(url(gateway.url)), check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    totals = lines.pop() if lines and lines[-1].get("done") else None
    assert (totals is None) == (done.returncode != 0) == bool(done.stderr), done.stderr
    assert not done.stderr.startswith(b"Trace"), done.stderr
    error = json.loads(done.stderr) if done.stderr else {}
    assert (totals or error)["listeners"] == 0, "the program's signal is left as it was"
    assert b"t0ken" not in done.stdout + done.stderr
    return Ran(done.returncode, [line["piece"] for line in lines], totals, error, gateway)


def problem(status: int, kind: str) -> httpx2.Response:
    body = json.dumps({"type": kind, "title": "Said in a test", "status": status}).encode()
    return served(status, body, {"content-type": "application/problem+json"})


def responding(*answers: httpx2.Response) -> dict[str, Any]:
    """A relay whose first answers to sealed requests are these."""
    coming = iter(answers)
    return {"respond": lambda request: next(coming, None) if request.url.path == SEALED else None}
