"""What is kept for an answer that runs for minutes: nothing of its audit entry, and one set of counters for each caller."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import httpx2
import pytest

from lacre_fabric.work import gateway_stream
from lacre_gateway.audit.log import Recorded
from lacre_gateway.audit.store import Committed
from lacre_gateway.budget.counters import CallersCounters
from lacre_gateway.budget.ledger import Ledger
from parts.fake_worker import FakeWorker
from parts.stage import Stage
from parts.waiting import PATIENCE, until

STREAMS = 3
KINDS = (Recorded, Committed, CallersCounters)


def alive() -> Counter[type]:
    gc.collect()
    return Counter(type(each) for each in gc.get_objects() if type(each) in KINDS)


async def test_what_open_streams_keep(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one caller, one after the other: the ledger has written between them."""
    monkeypatch.setattr(gateway_stream, "LOST_AFTER", PATIENCE)  # the worker sends no beats
    before, ledger = alive(), stage.gateway.budgets
    ends = asyncio.Event()

    async def pause() -> None:
        await ends.wait()

    def running() -> int:
        return sum(each.started for each in stage.gateway.metrics.live)

    worker.script.between = pause
    asked = []
    for number in range(1, STREAMS + 1):
        asked.append(asyncio.create_task(stage.post(client)))
        await until(lambda: running() == number)  # noqa: B023 - awaited here
        await _written(ledger)
    # the audit log's thread may have its last commit for a moment
    await until(lambda: alive() - before == {CallersCounters: 1} or running() < STREAMS)
    assert running() == STREAMS
    ends.set()
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * STREAMS


async def _written(ledger: Ledger) -> None:
    """Every budget is written once more, as usage is reported every few seconds."""
    for draw in ledger._draws.values():
        edition = draw.account.edition
        ledger._wake(draw)
        await until(lambda: draw.account.edition > edition and (draw.task is None or draw.task.done()))  # noqa: B023 - as above
