"""How fast models run on this machine: streams that generate together, and the reading of a prompt.

Rules:
- Several models are measured in turns and in rounds, so that other load affects all of them alike. The best round counts,
  because noise only lengthens a step.
- Every step has all cores, and the same history for each stream.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Model
from lacre_backend.engine.plan import Copy, EngineLimits, Segment, StepPlan
from lacre_backend.engine.tune import SLOTS
from lacre_backend.workshop.source import loaded

PROMPT: Final = 256  # tokens; afterwards, each stream's history
_CONTEXT: Final = 2 * PROMPT
_TOKEN: Final = 1  # any token: they all take the same time
_STEPS: Final = (4, 32)  # at least and at most, by number of streams; all of them fit into the context
_SECONDS: Final = 0.5  # no further step after these: short ones are repeated more often, since noise changes them most
_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second. streams: of all together, by their number. prompt: of a prompt of `PROMPT` tokens."""

    streams: dict[int, float]
    prompt: float


def speeds(paths: Sequence[Path], report: Callable[[float], None]) -> list[Speed]:
    """Of each model. report: is told the share that is done. Raises SettingsError."""
    best: dict[int, Speed] = {}
    for number in range(_ROUNDS * len(paths)):
        report(number / (_ROUNDS * len(paths)))
        which = number % len(paths)
        with loaded(paths[which]) as model:
            found = _speed(model)
        best[which] = better(best[which], found) if which in best else found
    return [best[which] for which in range(len(paths))]


def gain(fast: Speed, slow: Speed) -> float:
    """How many times as fast: the geometric mean over the numbers of streams and the prompt."""
    ratios = [fast.streams[n] / slow.streams[n] for n in SLOTS]
    return statistics.geometric_mean([*ratios, fast.prompt / slow.prompt])


def better(one: Speed, other: Speed) -> Speed:
    """The higher of each two figures."""
    return Speed({n: max(one.streams[n], other.streams[n]) for n in SLOTS}, max(one.prompt, other.prompt))


def _speed(model: Model) -> Speed:
    most = max(SLOTS)
    limits = EngineLimits(slots=most, context=_CONTEXT, cells=most * _CONTEXT, step=PROMPT)
    context = LlamaContext(model, limits, Compute(len(os.sched_getaffinity(0))))
    try:
        prompt = max(_prompt_rate(context) for _ in range(2))
        _execute(context, [], tuple(Copy(0, slot, PROMPT) for slot in range(1, most)))
        ends = [PROMPT] * most
        return Speed({n: _rate(context, n, ends) for n in SLOTS}, prompt)
    finally:
        context.free()


def _prompt_rate(context: LlamaContext) -> float:
    context.wipe()
    return PROMPT / _timed(context, [Segment(0, 0, (_TOKEN,) * PROMPT, None, True)])


def _rate(context: LlamaContext, n: int, ends: list[int]) -> float:
    """ends: where each stream is. It moves on: some models cannot take a token back."""
    took: list[float] = []
    least, most = _STEPS
    while len(took) < least or (len(took) < most and sum(took) < _SECONDS):
        took.append(_timed(context, [Segment(slot, ends[slot], (_TOKEN,), None, True) for slot in range(n)]))
        ends[:n] = [end + 1 for end in ends[:n]]
    return n / min(took)


def _timed(context: LlamaContext, segments: list[Segment]) -> float:
    began = time.perf_counter()
    _execute(context, segments)
    context.logits(len(segments))
    return time.perf_counter() - began


def _execute(context: LlamaContext, segments: list[Segment], memory: tuple[Copy, ...] = ()) -> None:
    context.execute(StepPlan(memory, tuple(segments), (), (), 0))
