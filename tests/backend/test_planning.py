"""What limits are none; and what planning costs, where contexts are long and requests are many."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from lacre.errors import UsageError
from lacre_backend.engine.plan import EngineLimits
from lacre_backend.engine.scheduler import Scheduler
from lacre_backend.engine.tokens import BLOCK, Tokens


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"cells": 1000}, {"cells": 100}, {"share": 0}, {"slots": 60, "cells": 600}, {"chunk": 100}]
)
def test_limits_that_contradict_each_other(change: dict[str, int]) -> None:
    limits = EngineLimits(slots=5, context=128, cells=640, step=64, chunk=32, burst=16, share=8)
    with pytest.raises(UsageError):
        dataclasses.replace(limits, **change)


@pytest.mark.parametrize("at", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7, None])
@pytest.mark.parametrize("length", [1, BLOCK, 5 * BLOCK + 30])
def test_the_common_beginning_of_two_texts(at: int | None, length: int) -> None:
    """Whether the tokens came at once or one by one. at: where they differ."""
    ours = list(range(length))
    theirs = [-1 if i == at else token for i, token in enumerate(ours)]
    grown = Tokens(theirs[: length // 2])
    for token in theirs[length // 2 :]:
        grown.append(token)
    expected = length if at is None else min(at, length)
    for other in (Tokens(theirs), grown, Tokens(theirs[: length // 3], theirs[length // 3 :])):
        assert Tokens(ours).common(other, length) == expected
    assert Tokens(ours).common(Tokens(ours, chained=False), length) == 0


class Full:
    """A scheduler whose 16 slots hold `length` tokens each, of one scope and with one beginning. Two of them run."""

    def __init__(self, length: int, *, unified: bool) -> None:
        self.length, context = length, length + 4096
        limits = EngineLimits(
            16, context, 16 * context, unified=unified, step=2 * length, chunk=length, share=length, multiple=4
        )
        self.scheduler = Scheduler(limits)
        for i in range(16):
            self.scheduler.submit(f"t{i}", self.prompt(i), b"s", fair=("t", str(i)))
        while self.scheduler.waiting or not all(slot.generating for slot in self.scheduler._slots):
            self.step()
        for i in range(2, 16):
            self.scheduler.end(f"t{i}")
        self.scheduler.limits = dataclasses.replace(self.scheduler.limits, step=512, chunk=256, share=32)  # as in use
        self.scheduler.share = 32
        self.scheduler.plan()

    def prompt(self, i: int) -> list[int]:
        """Its own from the middle on: the dearest case for whoever looks for a common beginning."""
        return [7] * (self.length // 2) + [100 + i] * (self.length // 2)

    def step(self) -> None:
        for segment in self.scheduler.plan().segments:
            if segment.task is not None and segment.output:
                self.scheduler.advance(segment.task, 9)

    def admission(self, tasks: int = 1) -> tuple[int, int]:
        """What planning costs that admits more such prompts: instructions of Python's machine, and bytes at the peak."""
        for i in range(tasks):
            self.scheduler.submit(f"new{i}", Tokens([*self.prompt(3 + i), 1, 2, 3]), b"s", fair=("u", "u"))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        count = _instructions(self.scheduler.plan)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert self.scheduler.started("new0")
        return count, peak


def _instructions(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()  # a measure of coverage goes on afterwards
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("unified", [False, True])
def test_planning_costs_the_same_for_a_long_context_as_for_a_short_one(unified: bool) -> None:
    """16 slots of 128k tokens: nothing in a plan may look at their cells or tokens one by one."""
    short, peak = Full(2048, unified=unified).admission()
    long, long_peak = Full(131072, unified=unified).admission()
    assert long < 2 * short, "the search for a common beginning may take a few steps more"
    assert max(peak, long_peak) < 64 * 1024, "no copy of a text or of its cells"


@pytest.mark.parametrize("unified", [False, True])
def test_many_admissions_in_one_step_cost_little_more_than_a_few(unified: bool) -> None:
    """What is left waits for the next step, a few milliseconds later, and nobody's stream waits for it."""
    few, _ = Full(2048, unified=unified).admission(4)
    full = Full(2048, unified=unified)
    many, _ = full.admission(13)
    assert many < 2 * few
    for _ in range(3):
        full.step()
    assert all(full.scheduler.started(f"new{i}") for i in range(13))
