"""Measures which way of running a model is the fastest on this machine.

Rules:
- Every combination runs the same steps over the same history, in turns and in several rounds, so that other load affects all of
  them alike. The best round counts, because noise only lengthens a step.
- It measures an engine's steady state: one token for each of `slots` sequences per step.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre_backend.engine.context import Compute, KvType, LlamaContext
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.plan import EngineLimits, StepPlan
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tune_histories import Histories

HISTORY: Final = 192  # tokens before the timed step
SLOTS: Final = (1, 4, 8, 16)
ENOUGH: Final = 0.95  # the fewest slots that reach this share of the best rate
_CONTEXT: Final = 512
_STEPS: Final = 3
_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model."""

    threads: int
    flash: bool
    unified: bool

    def __str__(self) -> str:
        cache = "unified" if self.unified else "split"
        return f"threads {self.threads}, flash {'on' if self.flash else 'off'}, {cache} cache"


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The fastest way, and all measurements. rates: tokens per second, by way and by number of sequences."""

    way: Way
    slots: int
    rates: dict[Way, dict[int, float]]

    def table(self) -> list[str]:
        """A table for people: one line per way, the best first."""
        heads = "tok/s by number of sequences: " + "  ".join(f"{n:>4}" for n in SLOTS)
        ways = sorted(self.rates, key=lambda way: -max(self.rates[way].values()))
        return [heads, *(f"{way!s:<42}" + "  ".join(f"{self.rates[way][n]:>4.0f}" for n in SLOTS) for way in ways)]


def tune(path: Path, gpu: Gpu, *, most: int, kv_type: KvType = "f16") -> TuningResult:
    """most: slots that fit into memory. kv_type: of the cache; only f16 is tried without flash attention.

    Takes about a minute for a small model on two cores. Raises SettingsError.
    """
    with closing(Tokenizer(path)) as tokenizer:
        model = Model(path, name=path.stem, digest="", n_ctx=_CONTEXT, gpu=gpu, tokenizer=tokenizer)
    cuttable = ModelMetadata.read(path).cuttable
    ways = [way for way in _ways() if way.flash or kv_type == "f16"]
    rates: dict[Way, dict[int, float]] = {way: dict.fromkeys(SLOTS, 0.0) for way in ways}
    for way in ways:
        limits = EngineLimits(
            slots=max(SLOTS), context=_CONTEXT, cells=max(SLOTS) * _CONTEXT, unified=way.unified, step=max(SLOTS) * 16
        )
        context = LlamaContext(model, limits, Compute(way.threads, way.flash, kv_type))
        try:
            histories = Histories(context, range(max(SLOTS)), HISTORY, cuttable=cuttable)
            for _, n in itertools.product(range(_ROUNDS), SLOTS):
                rates[way][n] = max(rates[way][n], _rate(context, histories, n))
        finally:
            context.free()
    return choose(rates, most)


def choose(rates: dict[Way, dict[int, float]], most: int) -> TuningResult:
    """The way with the highest rate, and the fewest slots that come close to it."""
    allowed = [n for n in SLOTS if n <= most] or [SLOTS[0]]
    way = max(rates, key=lambda way: max(rates[way][n] for n in allowed))
    best = max(rates[way][n] for n in allowed)
    return TuningResult(way, min(n for n in allowed if rates[way][n] >= ENOUGH * best), rates)


def _ways() -> Iterator[Way]:
    cores = len(os.sched_getaffinity(0))
    threads = sorted({cores, max(cores // 2, 1), max(cores - 1, 1)})
    for n, flash, unified in itertools.product(threads, (True, False), (False, True)):
        yield Way(n, flash, unified)


def _rate(context: LlamaContext, histories: Histories, n: int) -> float:
    best = float("inf")
    for _ in range(_STEPS):
        segments, after = histories.step(range(n))
        plan = StepPlan((), tuple(segments), after, (), 0)
        began = time.perf_counter()
        context.execute(plan)
        context.logits(n)
        best = min(best, time.perf_counter() - began)
    return n / best
