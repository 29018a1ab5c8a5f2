"""What guessing next tokens gains on this machine: tokens per second with guesses, divided by those without, in turns.

One engine runs the samples that `lacre worker tune` runs, with prompt lookup. `LACRE_BENCH_DRAFT=FILE` names a draft model to
measure after it.

- `KIND_SAMPLE_x`: one stream, guesses where they seem worth it. `KIND_SAMPLE_right`: the share of right ones; 0 without any.
- `KIND_always_x`: all samples, one stream, always up to 7 guesses. `KIND_always_right`: the share of right ones.
- `KIND_n8_x`: all samples, 8 streams, guesses where they seem worth it.
- `step_N_x`: a step of one stream with N tokens takes so many times as long as with one.

`LACRE_BENCH_THREADS=N` in the environment sets the threads; default: every core.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from bench import command
from bench.engine import model
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.draft_model import DraftFile
from lacre_backend.engine.gain import Gain, Offer
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.sizing import LlamaSettings, SpeculationKind
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tune_speculation import SAMPLES, try_speculation

CONTEXT: Final = 1024
STREAMS: Final = 8
ALWAYS: Final = 7  # guesses for each answer
HISTORY: Final = 200  # tokens before the steps whose cost is measured


class Always(Gain):
    """Checks the guesses that there are, up to `ALWAYS`, at any price."""

    def allot(self, offers: Sequence[Offer], each: float = 0.0) -> list[int]:  # noqa: ARG002 - the price
        return [min(offer.most, ALWAYS) for offer in offers]


def gains(kind: SpeculationKind, draft: DraftFile | None, threads: int, rounds: int) -> command.Figures:
    settings = LlamaSettings(n_ctx=CONTEXT, slots=STREAMS, threads=threads, flash=True, speculation=kind)
    found: command.Figures = {}
    with closing(LlamaEngine(model(), name="bench", digest="", settings=settings, draft=draft)) as engine:
        if (speculation := engine.speculation) is None:
            raise SystemExit("This engine does not speculate.")
        for name, text in SAMPLES.items():
            trial = try_speculation(engine, speculation, kind, [1], samples=[text], rounds=rounds)
            found |= {f"{kind}_{name}_x": round(trial.gain, 2), f"{kind}_{name}_right": round(trial.counts.acceptance, 2)}
        trial = try_speculation(engine, speculation, kind, [STREAMS], rounds=rounds)
        found[f"{kind}_n{STREAMS}_x"] = round(trial.gain, 2)
        speculation.gain = Always(0, even=False)
        trial = try_speculation(engine, speculation, kind, [1], rounds=rounds)
        return found | {f"{kind}_always_x": round(trial.gain, 2), f"{kind}_always_right": round(trial.counts.acceptance, 2)}


def steps(threads: int, rounds: int) -> command.Figures:
    path = model()
    loaded = Model(path, name="bench", digest="", n_ctx=CONTEXT, gpu=Gpu(), tokenizer=Tokenizer(path))
    limits = EngineLimits(slots=1, context=CONTEXT, cells=CONTEXT, drafts=16)
    context = LlamaContext(loaded, limits, Compute(threads, flash=True))
    context.execute(StepPlan((), (Segment(0, 0, [7] * HISTORY, "bench", True),), (), (), 0))
    took: dict[int, list[float]] = {n: [] for n in (1, 2, 3, 4, 8, 16)}
    for _ in range(rounds):
        for n, known in took.items():
            plan = StepPlan((), (Segment(0, HISTORY, [7] * n, "bench", True, n - 1),), (Trim(0, HISTORY),), (), 1)
            began = time.perf_counter()
            context.execute(plan)
            known.append(time.perf_counter() - began)
    context.free()
    middle = {n: statistics.median(known) for n, known in took.items()}
    return {f"step_{n}_x": round(seconds / middle[1], 2) for n, seconds in middle.items()}


def measure(quick: bool) -> command.Figures:
    """Medians over the rounds."""
    threads = int(os.environ.get("LACRE_BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
    rounds = 1 if quick else 5
    found = {"threads": float(threads)} | steps(threads, 20 * rounds) | gains("lookup", None, threads, rounds)
    if draft := os.environ.get("LACRE_BENCH_DRAFT"):
        found |= gains("draft", DraftFile(Path(draft), Path(draft).name), threads, rounds)
    return found


if __name__ == "__main__":
    command.run(__doc__, {"speculation": measure})
