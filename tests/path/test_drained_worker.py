"""Three workers, one of which an operator drains at the console while calls run, and lets take work again.

Real processes: nats-server, two gateways with consoles, three workers, each in front of a server that streams.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lacre
from parts.console_operator import Operator
from parts.console_site import WORDS, Consoles, with_consoles
from parts.waiting import PATIENCE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
WHOLE = "".join(f"w{number} " for number in range(WORDS))


@dataclass
class Callers:
    """Streams of several people, one after the other, until told otherwise. Nobody asks again or resumes."""

    consoles: Consoles
    whole: int = 0
    faults: list[str] = field(default_factory=list)
    over: bool = False

    async def run(self) -> None:
        urls = [gateway.url for gateway in self.consoles.live.gateways]
        await asyncio.gather(*(self._ask(number, urls[number % len(urls)]) for number in range(8)))

    async def _ask(self, number: int, url: str) -> None:
        """Half of the requests are offered to one worker first, and half wait in the queue."""
        live = self.consoles.live
        client = live.client_of(url, live.token(f"user-{number}"), None, affinity=number % 4 < 2)
        while not self.over:
            try:
                text = "".join([piece async for piece in client.chat_stream("Count.", max_tokens=64)])
            except lacre.LacreError as exc:
                self.faults.append(f"{type(exc).__name__}: {exc}")
                return
            if text != WHOLE:
                self.faults.append(f"cut short: {text!r}")
            self.whole += 1


@pytest.fixture
async def consoles(tmp_path: Path) -> AsyncIterator[Consoles]:
    async with with_consoles(tmp_path, gateways=2, workers=3) as consoles:
        yield consoles


async def test_one_of_three(consoles: Consoles) -> None:
    live, callers, operator = consoles.live, Callers(consoles), Operator.of(consoles)
    await operator.sign_in()
    calling = asyncio.create_task(callers.run())
    server = consoles.servers[1]
    await until(lambda: all(len(each.seen) >= 2 for each in consoles.servers), PATIENCE, lambda: callers.faults)
    version = (await operator.workers())["n2"]["version"]
    assert version
    await operator.order("drain", "n2")
    async with asyncio.timeout(PATIENCE):  # what it had pulled before ends whole
        while (told := await operator.workers())["n2"]["busy"]:
            await asyncio.sleep(0.5)
    at = len(server.seen)
    assert (told["n2"]["drained"], told["n2"]["models"]) == (True, [])
    other = Operator.of(consoles, 1)
    assert (await other.workers())["n2"]["drained"], "the other gateway hears it too"
    await _more(callers, 24)
    assert len(server.seen) == at, "nothing begins after that"
    await other.sign_in()
    await other.order("resume", "n2")
    await until(lambda: len(server.seen) > at, PATIENCE, lambda: callers.faults)
    callers.over = True
    await calling
    assert callers.faults == []
    assert [entry["target"] for entry in live.entries("admin") if entry["action"] == "admin:drain_worker"] == [
        "default/lacre/n2#drain"
    ]  # fmt: skip
    log = live.workers[1].log.read_text()
    [intent] = [entry for entry in live.entries("admin") if entry["action"] == "admin:drain_worker"]
    assert re.search(f'"worker.drained".*{intent["request_id"]}|{intent["request_id"]}.*"worker.drained"', log), log[-2000:]
    assert "root" not in log, "the worker does not learn who ordered it"


async def _more(callers: Callers, number: int) -> None:
    goal = callers.whole + number
    await until(lambda: callers.whole >= goal or bool(callers.faults), PATIENCE, lambda: callers.faults)


async def test_a_restart_is_the_way_back(consoles: Consoles) -> None:
    """Without any gateway's word."""
    operator, live = Operator.of(consoles), consoles.live
    await operator.sign_in()
    await operator.order("drain", "n3")
    worker = live.workers[2]
    assert worker.runs
    worker.stop()
    worker.start()

    async with asyncio.timeout(PATIENCE):
        while not (found := (await operator.workers()).get("n3")) or found["drained"] or found["models"] != ["tiny"]:
            await asyncio.sleep(0.5)
