"""`kill -SEGV` of an engine in the middle of an answer, thirty times: the caller sees one stream, the worker stays."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

import lacre
from lacre.errors import LacreError
from parts.stage import LiveStage, busiest
from parts.stage.processes import WorkerProcess
from parts.up import engine_of
from parts.waiting import until

KILLS = 30
LIMIT = 100  # tokens of an answer
PATIENCE = 180.0  # seconds; the machine may be busy


def ready(worker: WorkerProcess) -> int:
    """How often it said so."""
    return worker.log.read_text().count('"worker.ready"')


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_a_crash_at_a_random_token(tmp_path: Path, record_property: Any) -> None:
    chance, whole, resumed, typed, away = random.Random(17), 0, 0, list[LacreError](), list[float]()
    async with (
        LiveStage.on_air(tmp_path, workers=2) as pool,
        lacre.AsyncClient(pool.gateways[0].url, token=pool.site.token("jo"), memory=lacre.VersionMemory()) as client,
    ):
        processes = [worker.process.pid for worker in pool.workers]
        for number in range(KILLS):
            await pool.heard()
            place, before = chance.randrange(1, 60), [worker.ticks for worker in pool.workers]
            stream, pieces, struck = client.chat_stream(f"A long story, number {number}.", max_tokens=LIMIT), 0, None
            try:
                async for _ in stream:
                    pieces += 1
                    if pieces == place:
                        struck = busiest(pool.workers, before)
                        times, engine, began = ready(struck), engine_of(struck.process.pid), time.monotonic()
                        assert engine is not None
                        os.kill(engine, signal.SIGSEGV)
                assert stream.finish_reason in ("stop", "length")
                whole += 1
                resumed += len(stream.parts)
            except LacreError as exc:
                typed.append(exc)
            if struck is not None:
                victim, said = struck, times
                await until(lambda victim=victim, said=said: ready(victim) > said, PATIENCE, victim.said)
                away.append(time.monotonic() - began)
        assert [worker.process.pid for worker in pool.workers if worker.runs] == processes, "no worker ended"
        assert all('"it ended with SIGSEGV"' in worker.log.read_text() for worker in pool.workers)
    report = {
        "whole": whole,
        "resumed": resumed,
        "typed": [f"{type(each).__name__}: {each} ({each.__cause__})" for each in typed],
        "away_median_s": round(statistics.median(away), 1),
        "away_max_s": round(max(away), 1),
    }
    record_property("engine_crashes", report)
    print(report)
    assert whole + len(typed) == KILLS
    assert resumed > KILLS // 3, "many were struck before their end"
    assert len(typed) <= KILLS // 10, "the other worker goes on with the answer"
    assert all(isinstance(each, lacre.StreamBroken | lacre.Unavailable) for each in typed)
