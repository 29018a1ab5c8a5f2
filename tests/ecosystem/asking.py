"""One client after another through `lacre proxy`, feature by feature, and whether what it tells is right.

`LACRE_RECORD=1` writes what was seen into clients.json. Otherwise it is compared, so that docs/clients.md says what is true.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from ecosystem import bodies
from ecosystem.clients import Client, Feature, settle
from ecosystem.conftest import PROGRAMS, environment
from parts import npm, scripts
from parts.minilm import NAME
from parts.stage import SCRIPTED, Proxy, ScriptedStage, until
from parts.waiting import PATIENCE

# The answers of a real model are its own. Of tools, test_programs.py says more.
_OF_MODEL: Final[tuple[Feature, ...]] = ("chat", "stream", "structured", "embeddings")
_WIDTH: Final = 384  # of an embedding


def command(client: Client) -> tuple[list[str], Path]:
    """What starts the program, and where."""
    if client.node:
        if not shutil.which("node") or not shutil.which("npm"):
            pytest.skip("node and npm are not installed")
        npm.install(client.room)
        return ["node", "client.mjs"], client.room
    folder = client.room if client.heavy else PROGRAMS
    return [environment(client.environment), f"client_{client.program}.py"], folder


@contextmanager
def asking(client: Client, proxy: Proxy, model: str, *features: str) -> Iterator[dict[Feature, Any]]:
    """What the program tells of each feature. It lives until the body ends."""
    line, folder = command(client)
    asked = {"MODEL": model, "EMBEDDER": SCRIPTED if model == SCRIPTED else NAME}
    given = proxy.environment() | asked | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(PROGRAMS)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*line, *features], cwd=folder, env=given, text=True, **pipes) as process:
        assert process.stdout is not None
        found = next((line for line in process.stdout if line.startswith("{")), "")
        if found:
            yield json.loads(found)
        _, complained = process.communicate(timeout=60)
    assert found, complained
    assert process.returncode == 0, complained


def ask(client: Client, proxy: Proxy, model: str, *features: str) -> dict[Feature, Any]:
    with asking(client, proxy, model, *features) as told:
        return told


def right(feature: Feature, told: Any) -> bool:
    """Whether the scripted engine's answer arrived whole."""
    match feature:
        case "chat":
            return bool(told.get("text") == scripts.PLAIN)
        case "stream":
            return bool(told.get("text") == scripts.PLAIN and told["pieces"] > 3)
        case "tools":
            return scripts.sunny(scripts.CITY) in str(told.get("text"))
        case "structured":
            return bool(told == scripts.FELT)
        case "reasoning":
            return bool(told.get("text") == scripts.PLAIN and told["thought"].strip() == scripts.THOUGHT)
        case "cancellation":
            return bool(told.get("pieces"))
        case "long":
            return bool(told.get("text") == scripts.LONG)
    raise AssertionError(feature)


def right_of_a_model(feature: Feature, told: Any) -> bool:
    if feature == "embeddings":
        return bool(told == {"length": _WIDTH, "many": 2})
    if feature == "structured":
        return set(told) == set(scripts.FELT) and told["mood"] in ("good", "bad") and isinstance(told["points"], int)
    return bool(told.get("text")) and (feature == "chat" or told["pieces"] > 1)


@asynccontextmanager
async def in_thread(entered: AbstractContextManager[dict[Feature, Any]]) -> AsyncIterator[dict[Feature, Any]]:
    """A context whose entry and exit block."""
    found = await asyncio.to_thread(entered.__enter__)
    try:
        yield found
    finally:
        await asyncio.to_thread(entered.__exit__, None, None, None)


async def with_a_scripted_engine(live: ScriptedStage, client: Client) -> None:
    features = [feature for feature in client.features if feature not in ("cancellation", "embeddings")]
    since = len(live.scripted.asked())
    told = await asyncio.to_thread(ask, client, live.proxy, SCRIPTED, *features)
    if bodies.RECORDING and "embeddings" in client.features:  # it asks, and the worker has no embedder
        await asyncio.to_thread(ask, client, live.proxy, SCRIPTED, "embeddings")
    bodies.keep(client, live, since)
    seen = {feature: right(feature, told[feature]) for feature in features}
    if "cancellation" in client.features:
        before = live.scripted.ends()
        async with in_thread(asking(client, live.proxy, SCRIPTED, "cancellation")) as left:
            if right("cancellation", left["cancellation"]):
                await until(lambda: live.scripted.ends().total() > before.total(), PATIENCE)
        stopped = live.scripted.ends()["cancelled"] - before["cancelled"]
        told |= left
        seen["cancellation"] = right("cancellation", left["cancellation"]) and stopped == 1
    settle(client, "scripted", seen, told)


async def with_a_real_model(proxy: Proxy, client: Client) -> None:
    features = [feature for feature in _OF_MODEL if feature in client.features]
    told = await asyncio.to_thread(ask, client, proxy, "smollm2-135m", *features)
    settle(client, "model", {feature: right_of_a_model(feature, told[feature]) for feature in features}, told)
