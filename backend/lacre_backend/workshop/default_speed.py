"""How fast the types of the default model are here: the child's half of `default_model.py`.

Rules:
- The speed is that of one thread, by its CPU time, in turns with the shipped file. So other programs change it little.
- Every step has the same history. The shipped file is measured again beside each type.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Model
from lacre_backend.engine.plan import Copy, EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.tune import SLOTS
from lacre_backend.models.gguf import FileDigests
from lacre_backend.workshop.child import Job, Report
from lacre_backend.workshop.rewriting import Rewriting, rewrite
from lacre_backend.workshop.source import SourceModel, loaded
from lacre_backend.workshop.speed import Speed

PROMPT: Final = 64  # tokens; as many precede every step. From 64 on, llama.cpp computes as for a long prompt
_ROUNDS: Final = 2
_REPEATS: Final = {1: 4, 4: 2}  # by number of streams: short steps are repeated, because noise changes them most
_CONTEXT: Final = 4 * PROMPT
_TOKEN: Final = 1  # any token: they all take the same time


@dataclass(frozen=True, slots=True)
class MeasureAsked:
    """source: the shipped file. folder: for files that are deleted again. seconds: after these, no further type is tried."""

    source: Path
    folder: Path
    types: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class MeasuredRounds:
    """Of one type. source, other: the speeds in each round, of the shipped file and of the type."""

    type: str
    source: list[Speed]
    other: list[Speed]


def measure(asked: MeasureAsked, report: Report) -> list[MeasuredRounds]:
    """Of each type that was tried, in their order. Raises SettingsError or OSError."""
    deadline = time.monotonic() + asked.seconds
    found: list[MeasuredRounds] = []
    with loaded(asked.source) as source, _context(source) as beside:
        for number, name in enumerate(asked.types):
            if found and time.monotonic() > deadline:
                break
            report(name, number / len(asked.types))
            path = asked.folder / f".{name}.draft"  # the parent removes it if this process dies
            try:
                rewrite(asked.source, path, Rewriting(name), lambda _share: None)
                with loaded(path) as model, _context(model) as context:
                    found.append(MeasuredRounds(name, *_in_turns(beside, context)))
            finally:
                path.unlink(missing_ok=True)
    return found


MEASURE: Final = Job(f"{__name__}:MEASURE", MeasureAsked, list[MeasuredRounds], measure)


@dataclass(frozen=True, slots=True)
class WriteAsked:
    """out: a draft of the type's file."""

    source: Path
    out: Path
    type: str


def write(asked: WriteAsked, report: Report) -> str:
    """Writes a type's file and tries it. The answer is its digest, `sha256:` and hex. Raises SettingsError or OSError."""
    report(asked.type, 0.0)
    rewrite(asked.source, asked.out, Rewriting(asked.type), lambda share: report(asked.type, share))
    SourceModel.read(asked.out).check_weights()
    with loaded(asked.out) as model, _context(model) as context:
        context.execute(_reading())
    return "sha256:" + FileDigests.read([asked.out]).model


WRITE: Final = Job(f"{__name__}:WRITE", WriteAsked, str, write)


@contextmanager
def _context(model: Model) -> Iterator[LlamaContext]:
    """Every stream has its history."""
    most = max(SLOTS)
    limits = EngineLimits(slots=most, context=_CONTEXT, cells=most * _CONTEXT, step=_CONTEXT)
    context = LlamaContext(model, limits, Compute(threads=1))
    try:
        copies = tuple(Copy(0, slot, PROMPT) for slot in range(1, most))
        context.execute(StepPlan((), (Segment(0, 0, (_TOKEN,) * PROMPT, None, True),), (), (), 0))
        context.execute(StepPlan(copies, (), (), (), 0))
        yield context
    finally:
        context.free()


def _in_turns(source: LlamaContext, other: LlamaContext) -> tuple[list[Speed], list[Speed]]:
    pairs = [(_speed(source), _speed(other)) for _ in range(_ROUNDS)]
    return [one for one, _ in pairs], [two for _, two in pairs]


def _speed(context: LlamaContext) -> Speed:
    streams = {n: n / min(_seconds(context, _generating(n), n) for _ in range(_REPEATS.get(n, 1))) for n in SLOTS}
    return Speed(streams, PROMPT / _seconds(context, _reading(), 1))


def _generating(n: int) -> StepPlan:
    segments = tuple(Segment(slot, PROMPT, (_TOKEN,), None, True) for slot in range(n))
    return StepPlan((), segments, tuple(Trim(slot, PROMPT) for slot in range(n)), (), 0)


def _reading() -> StepPlan:
    return StepPlan((), (Segment(0, PROMPT, (_TOKEN,) * PROMPT, None, True),), (Trim(0, PROMPT),), (), 0)


def _seconds(context: LlamaContext, plan: StepPlan, rows: int) -> float:
    """Of CPU time: a single thread of llama.cpp computes in the thread that calls it."""
    began = time.thread_time()
    context.execute(plan)
    context.logits(rows)
    took = time.thread_time() - began
    if took <= 0:
        raise SettingsError("this system does not tell the CPU time of a thread")
    return took
