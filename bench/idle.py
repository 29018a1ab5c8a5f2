"""What a conversation waits for its next turn after others took its slot: with copies of idle caches, and without, in turns.

One engine keeps copies, one keeps none, both with the same slots. In each round a conversation has its first turn, and as many
others as there are slots push it out. Then it comes back with a next turn, beside one running answer.

- `N_with_ms`, `N_without_ms`: from the return to its first token, at a first turn of N tokens. `N_warm_ms`: still in its slot.
- `N_cached`: the share of the return's prompt that was cached, with copies.
- `N_gap_ms`, `N_gap_without_ms`: the longest time between two tokens of the answer beside it, from the first turn that pushes
  out to the return's first token. `N_step_ms`: the middle one.
- `N_save_ms`, `N_restore_ms`, `N_copy_mb`: one copy, alone.

`LACRE_BENCH_THREADS=N` in the environment sets the threads; default: every core.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, closing
from typing import Final

from bench import command
from bench.engine import model
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.plan import Restore, Save, Segment, StepPlan, Trim
from lacre_backend.engine.protocol import Sampling, Task, Token
from lacre_backend.engine.sizing import LlamaSettings

LENGTHS: Final = (500, 1000, 2000)
TURN: Final = 60  # tokens of the next turn
SLOTS: Final = 4
CONTEXT: Final = 4096
OTHER: Final = 150  # tokens of each conversation that pushes others out
BESIDE: Final = 3000  # tokens of the running answer: longer than a round
NUMBER: Final = 10**6  # of a copy that the scheduler does not know
_ids = itertools.count()


def text(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(1000, 40_000) for _ in range(length))


def engine_of(idle_caches: int | None) -> LlamaEngine:
    threads = int(os.environ.get("LACRE_BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
    settings = LlamaSettings(n_ctx=CONTEXT, slots=SLOTS, threads=threads, flash=True, idle_caches=idle_caches)
    return LlamaEngine(model(), name="bench", digest="", settings=settings)


def task(prompt: tuple[int, ...], tokens: int, scope: bytes) -> Task:
    greedy = Sampling(temperature=0, logit_bias={0: -1000.0, 2: -1000.0})
    return Task(f"t{next(_ids)}", prompt, tokens, sampling=greedy, cache_scope=scope, fair=("tenant", scope.hex()))


async def first(engine: LlamaEngine, prompt: tuple[int, ...], scope: bytes) -> tuple[float, int]:
    """Seconds to the first token, and the tokens that were cached."""
    began, took, cached = time.perf_counter(), 0.0, 0
    async for event in engine.submit(task(prompt, 2, scope)):
        if isinstance(event, Token) and not took:
            took, cached = time.perf_counter() - began, event.cached_tokens
    return took, cached


class Beside:
    """An answer that runs meanwhile."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self._task = task(text(50, 0), BESIDE, b"beside")
        self.times: list[float] = []

    async def run(self) -> None:
        async for _ in self._engine.submit(self._task):
            self.times.append(time.perf_counter())

    def end(self) -> None:
        self._engine.cancel(self._task.id)

    def gaps(self, since: float) -> list[float]:
        times = [each for each in self.times if each >= since]
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


async def turn(engine: LlamaEngine, length: int, seed: int) -> dict[str, float]:
    """One round."""
    prompt, scope = text(length, seed), seed.to_bytes(8, "big")
    await first(engine, prompt, scope)
    beside = Beside(engine)
    running = asyncio.create_task(beside.run())
    while not beside.times:
        await asyncio.sleep(0.01)
    warm, _ = await first(engine, prompt + text(TURN, seed + 1), scope)
    since = time.perf_counter()
    for other in range(SLOTS):
        await first(engine, text(OTHER, seed + 2 + other), b"other" + (seed + other).to_bytes(8, "big"))
    returned = prompt + text(TURN, seed + 1) + text(TURN, seed + 9)
    took, cached = await first(engine, returned, scope)
    gaps = beside.gaps(since)
    beside.end()
    await running
    return {
        "warm": 1e3 * warm,
        "took": 1e3 * took,
        "cached": cached / len(returned),
        "gap": max(gaps),
        "step": statistics.median(gaps),
    }


def copies(engine: LlamaEngine, length: int) -> dict[str, float]:
    """What one copy takes, with nothing beside it. The engine's thread is idle."""
    context, vault, took = engine._context, engine._context.vault, defaultdict[str, list[float]](list)
    if vault is None:
        raise SystemExit("This engine keeps no copies.")
    tokens = text(length, 3)
    context.remember([Trim(slot, 0) for slot in range(2)])
    for at in range(0, length, 500):
        piece = tokens[at : at + 500]
        context.execute(StepPlan((), (Segment(0, at, piece, "bench", True),), (), (), 0))
    saved, size = Save(0, NUMBER, length, b"s", None), 0
    for _ in range(7):
        before = vault.counts.bytes
        began = time.perf_counter()
        vault.save(saved)
        took["save"].append(1e3 * (time.perf_counter() - began))
        size = vault.counts.bytes - before
        context.remember([Trim(1, 0)])
        began = time.perf_counter()
        if not vault.restore(Restore(1, NUMBER, length, length - 1, "bench", b"s", None)):
            raise SystemExit("The copy does not open.")
        took["restore"].append(1e3 * (time.perf_counter() - began))
        vault.discard(NUMBER)
    context.remember([Trim(slot, 0) for slot in range(2)])
    return {"save_ms": statistics.median(took["save"]), "restore_ms": statistics.median(took["restore"]), "copy_mb": size / 1e6}


async def returns(kept: LlamaEngine, none: LlamaEngine, rounds: int, lengths: tuple[int, ...]) -> command.Figures:
    found: command.Figures = {}
    for length in lengths:
        seen: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds):
            seed = 100 * (length + number)
            for name, engine in (("with", kept), ("without", none)):
                for key, value in (await turn(engine, length, seed)).items():
                    seen[f"{key}_{name}"].append(value)
        middle = {key: statistics.median(values) for key, values in seen.items()}
        found |= {
            f"{length}_with_ms": round(middle["took_with"], 1),
            f"{length}_without_ms": round(middle["took_without"], 1),
            f"{length}_warm_ms": round(middle["warm_with"], 1),
            f"{length}_cached": round(middle["cached_with"], 3),
            f"{length}_gap_ms": round(middle["gap_with"], 1),
            f"{length}_gap_without_ms": round(middle["gap_without"], 1),
            f"{length}_step_ms": round(middle["step_with"], 1),
        }
    return found


def measure(quick: bool) -> command.Figures:
    """Medians over the rounds."""
    with ExitStack() as stack:
        kept, none = (stack.enter_context(closing(engine_of(most))) for most in (None, 0))
        found: command.Figures = {}
        for length in LENGTHS:
            found |= {f"{length}_{name}": round(value, 1) for name, value in copies(kept, length).items()}
        return found | asyncio.run(returns(kept, none, 1 if quick else 5, LENGTHS[:1] if quick else LENGTHS))


if __name__ == "__main__":
    command.run(__doc__, {"idle": measure})
