"""Measures how many tokens a step should have on this machine: of prompts alone, and beside answers.

Rules:
- Steps of growing size run in turns, and the best of each counts, because noise only lengthens a step.
- It ends where a larger step reads no faster: on CPUs after some hundred tokens, on GPUs after thousands.
- Choosing is pure. It takes seconds and gives settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Model
from lacre_backend.engine.pace import PREFILL
from lacre_backend.engine.plan import BURST, CHUNK, STEP, EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.sizing import LlamaSettings, derive
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tune_histories import TOKEN, Histories

SIZES: Final = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of a prompt in a step
LEAST: Final = 32  # tokens of a chunk and of a burst
ENOUGH: Final = 0.95  # the smallest choice that reaches this share of the best rate
PAUSE: Final = 0.1  # seconds that a step with short prompts may take: a reader does not notice it
SHARES: Final = (0.2, 0.3, 0.4, 0.5, PREFILL)  # of a step's time
_HISTORY: Final = 192  # tokens of each answer
_STEPS: Final = 3
_SLOW: Final = 1.0  # seconds; a step of as many is not repeated
_ROUND: Final = 64  # to which a step's size is rounded up


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step, by tokens of a prompt: alone, and beside answers. quiet: of a step of the answers alone, 0 if there is
    a single slot.
    """

    quiet: float
    alone: Mapping[int, float]
    beside: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The choice, as settings of a model. table: for people."""

    n_batch: int = STEP
    chunk: int = CHUNK
    burst: int = BURST
    prefill: float = PREFILL
    table: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"steps of {self.n_batch}, chunks of {self.chunk}, bursts of {self.burst}, prefill {self.prefill}"


def tune_steps(path: Path, settings: LlamaSettings) -> StepSizes:
    """settings: with the chosen threads, flash and slots. Raises SettingsError."""
    shape = derive(path, settings)
    slots, context = shape.limits.slots, shape.limits.context
    sizes = [n for n in SIZES if n <= context - 1]
    with closing(Tokenizer(path)) as tokenizer:
        model = Model(path, name=path.stem, digest="", n_ctx=context, gpu=settings.gpu, tokenizer=tokenizer)
    limits = EngineLimits(
        slots=slots,
        context=context,
        cells=shape.limits.cells,
        unified=settings.unified,
        step=max(STEP, slots + max(sizes)),
    )
    running = LlamaContext(model, limits, Compute(shape.threads, settings.flash, settings.kv_type, settings.n_ubatch))
    try:
        histories = Histories(running, range(slots - 1), min(_HISTORY, context // 2), cuttable=shape.limits.cuttable)
        return choose_steps(_times(running, histories, slots, sizes), slots, settings.n_ubatch or 0)
    finally:
        running.free()


def choose_steps(times: StepTimes, slots: int, n_ubatch: int = 0) -> StepSizes:
    """The smallest chunk that reads nearly as fast as any, the largest burst that nobody notices, the smallest share that reads
    nearly as fast as the largest one. n_ubatch: as set; a step is never smaller.
    """
    rates = {n: n / seconds for n, seconds in times.alone.items() if n >= LEAST} or {LEAST: 1.0}
    chunk = min(n for n in rates if rates[n] >= ENOUGH * max(rates.values()))
    pause = max(PAUSE, times.quiet / (1 - PREFILL))
    burst = max((n for n, seconds in times.beside.items() if LEAST < n <= chunk and seconds <= pause), default=LEAST)
    speeds = {share: _fitting(times, share) * (1 - share) for share in SHARES} if times.beside else {PREFILL: 1.0}
    fastest = max(speeds.values())
    prefill = min(share for share in speeds if speeds[share] >= ENOUGH * fastest) if fastest > 0 else PREFILL
    n_batch = max(-(-(slots + burst + chunk) // _ROUND) * _ROUND, n_ubatch)
    return StepSizes(n_batch, chunk, burst, prefill, tuple(_table(times)))


def _fitting(times: StepTimes, share: float) -> float:
    """Prompt tokens beside answers that take this share of a step. Between two measured sizes the cost is a straight line."""
    allowed = times.quiet / (1 - share)
    fits, took = 0, times.quiet
    for n in sorted(times.beside):
        if times.beside[n] > allowed:
            return fits + (n - fits) * max(allowed - took, 0.0) / (times.beside[n] - took)
        fits, took = n, times.beside[n]
    return float(fits)


def _table(times: StepTimes) -> Iterator[str]:
    sizes = sorted({*times.alone, *times.beside})
    yield "ms a step by tokens of a prompt: " + "  ".join(f"{n:>5}" for n in sizes)
    for name, seconds in (("alone", times.alone), (f"beside answers, which take {times.quiet * 1e3:.1f}", times.beside)):
        if seconds:
            yield f"{name:<33}" + "  ".join(f"{seconds[n] * 1e3:>5.0f}" if n in seconds else " " * 5 for n in sizes)


def _times(context: LlamaContext, histories: Histories, slots: int, sizes: list[int]) -> StepTimes:
    """The last slot reads, the others have answers."""
    answers = range(slots - 1)
    quiet = _best(context, histories, answers, 0) if answers else 0.0
    alone: dict[int, float] = {}
    beside: dict[int, float] = {}
    for n in sizes:
        alone[n] = _best(context, histories, (), n)
        if answers:
            beside[n] = _best(context, histories, answers, n)
        if n > LEAST and alone[n] * ENOUGH > 2 * alone[n // 2]:
            break
    return StepTimes(quiet, alone, beside)


def _best(context: LlamaContext, histories: Histories, answers: Sequence[int], n: int) -> float:
    """Seconds of a step of these answers, and of n tokens of a prompt in the slot after all of them."""
    best = float("inf")
    for _ in range(_STEPS):
        segments, after = histories.step(answers)
        if n:
            segments.append(Segment(histories.free, 0, (TOKEN,) * n, None, True))
            after = (*after, Trim(histories.free, 0))
        began = time.perf_counter()
        context.execute(StepPlan((), tuple(segments), after, (), 0))
        best = min(best, time.perf_counter() - began)
        if best > _SLOW:
            break
    return best
