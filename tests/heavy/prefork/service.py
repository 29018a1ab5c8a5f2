"""The service of an application: one client for each kind, made and used while the module loads, before anybody forks.

SERVICE_URL: the connection string. Nothing is tried again, so that whatever goes wrong is seen.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

import lacre

SAID: Final = "one two three"  # by tests/parts/chat_app.py
OPTIONS: Final[dict[str, Any]] = {"token": "t0ken", "memory": lacre.VersionMemory(), "retries": 0, "resume": 0}

client: Final = lacre.Client(os.environ["SERVICE_URL"], **OPTIONS)
asynchronous: Final = lacre.AsyncClient(os.environ["SERVICE_URL"], **OPTIONS)


async def _ask() -> str:
    return (await asynchronous.chat("x")).text


def answer(number: int) -> str:
    """One call, of the kind that is due. Returns what went wrong, or "ok"."""
    try:
        kinds = (lambda: client.chat("x").text, lambda: "".join(client.chat_stream("x")), lambda: asyncio.run(_ask()))
        said = kinds[number % len(kinds)]()
    except Exception as exc:  # noqa: BLE001 - whatever comes is told
        return f"{type(exc).__name__}: {exc}"
    return "ok" if said == SAID else f"another answer: {said}"


if (warm := [answer(number) for number in range(3)]) != ["ok"] * 3:
    raise SystemExit(f"before any fork: {warm}")
