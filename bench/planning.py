"""Time to plan a step, at 16 slots whose caches hold 128,000 tokens each: milliseconds, best and median.

The prompts share one cache scope and differ from the middle on. That is the most expensive case for the search of common
beginnings.

- `step`: two slots generate.
- `admission`: one more such prompt is admitted.
- `crowd`: fourteen prompts wait at once, of which a step admits a few.
- `admission_x_short`: the ratio to caches of 2,000 tokens; 1 means that length costs nothing.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from bench import command
from lacre_backend.engine.plan import EngineLimits
from lacre_backend.engine.scheduler import Scheduler
from lacre_backend.engine.tokens import Tokens

SLOTS, RUNNING = 16, 2
LONG, SHORT = 128_000, 2_000  # tokens


def prompt(length: int, number: int) -> Tokens:
    half = length // 2
    return Tokens([7] * half + [100 + number] * half + [1, 2, 3])


def step(scheduler: Scheduler) -> tuple[float, int]:
    """How long its planning took, in milliseconds; and how many slots generated."""
    began = time.perf_counter()
    plan = scheduler.plan()
    took = (time.perf_counter() - began) * 1e3
    for segment in plan.segments:
        if segment.task is not None and segment.output:
            scheduler.advance(segment.task, 9)
    return took, plan.generating


def timed(scheduler: Scheduler) -> float:
    return step(scheduler)[0]


def full(length: int, *, unified: bool) -> Scheduler:
    """All slots hold `length` tokens; the first ones generate, the others are idle caches."""
    context = length + 1024
    limits = EngineLimits(
        SLOTS, context, SLOTS * context, unified=unified, step=2 * context, chunk=length, share=length, multiple=4
    )
    scheduler = Scheduler(limits)
    for number in range(SLOTS):
        scheduler.submit(f"t{number}", prompt(length, number), b"scope", fair=("tenant", str(number)))
    while step(scheduler)[1] < SLOTS:
        pass
    for number in range(RUNNING, SLOTS):
        scheduler.end(f"t{number}")
    scheduler.limits, scheduler.share = replace(limits, step=512, chunk=256, share=32), 32
    timed(scheduler)
    return scheduler


def measured(length: int, rounds: int, *, unified: bool) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"step": [], "admission": [], "crowd": []}
    for _ in range(rounds):
        scheduler = full(length, unified=unified)
        found["step"] += [timed(scheduler) for _ in range(20)]
        scheduler.submit("one", prompt(length, 3), b"scope", fair=("another", "one"))
        found["admission"].append(timed(scheduler))
        scheduler.end("one")
        timed(scheduler)
        for number in range(SLOTS - RUNNING):
            scheduler.submit(f"n{number}", prompt(length, number), b"scope", fair=("another", str(number)))
        found["crowd"].append(timed(scheduler))
    return found


def measure(quick: bool) -> command.Figures:
    figures: command.Figures = {}
    for name, unified in (("split", False), ("unified", True)):
        rounds = 3 if quick else 10
        for what, times in measured(LONG, rounds, unified=unified).items():
            figures[f"{name}_{what}_ms"] = round(statistics.median(times), 4)
            figures[f"{name}_{what}_best_ms"] = round(min(times), 4)
        short = measured(SHORT, rounds, unified=unified)
        figures[f"{name}_admission_x_short"] = round(figures[f"{name}_admission_best_ms"] / min(short["admission"]), 2)
    return figures


if __name__ == "__main__":
    command.run(__doc__, {"planning": measure})
