"""What the choice of the default model's type gains: our engine with the shipped file beside what `lacre up` serves, in turns.

Each is a process of its own (`bench/runner.py`), stopped while the other runs. Unique prompts, answers of 64 tokens, all cores.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack

from bench import command
from bench.engine import Peer, model
from lacre_backend.models import gguf

SIZES = (1, 4, 8, 16)


def measure(quick: bool) -> command.Figures:
    """Medians over the rounds. x_…: how many times as fast the chosen file is, the median of the rounds' ratios.

    prompt: tokens per second of a prompt of about 540 tokens, from its first token's time.
    """
    threads = int(os.environ.get("LACRE_BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        both = [Peer("ours", sys.executable, path, threads) for path in (gguf.default_path(), model())]
        for each in both:
            stack.callback(each.close)
            each.ready()
        for turn in range(2 if quick else 7):
            for n in SIZES:
                found = _in_turns(both, turn, "batch", n=n, tokens=64)
                for name in ("rate", "decode", "ttft"):
                    runs[f"{name}_n{n}"].append((found[0][name], found[1][name]))
            found = _in_turns(both, turn, "warm")
            runs["prompt"].append((540e3 / found[0]["cold"], 540e3 / found[1]["cold"]))
    figures: command.Figures = {"threads": float(threads)}
    for name, pairs in runs.items():
        figures[f"shipped_{name}"] = round(statistics.median(one for one, _ in pairs), 1)
        figures[f"chosen_{name}"] = round(statistics.median(two for _, two in pairs), 1)
        figures[f"x_{name}"] = round(statistics.median(two / one for one, two in pairs), 3)
    return figures


def _in_turns(both: list[Peer], turn: int, what: str, **arguments: int) -> list[dict[str, float]]:
    """What each does, in the order of `both`. Every second turn begins with the other one."""
    found = [each.do(what, **arguments) for each in (both if turn % 2 == 0 else both[::-1])]
    return found if turn % 2 == 0 else found[::-1]


if __name__ == "__main__":
    command.run(__doc__, {"default_model": measure})
