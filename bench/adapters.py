"""What LoRA adapters cost: the change from one to another, and tokens per second of 8 streams that use several.

One engine has the base model and two adapters of random weights (rank 8, the four matrices of attention). The loads take
turns. Two have 8 streams of one model: the base, or an adapter. Two are mixed: 4 and 4 of the base and one adapter; 3, 3 and 2
of the base and both. Each stream of a load is of another model than the one before it. The tests write the adapters:

    PYTHONPATH=tests .venv/bin/python -m bench.adapters

`LACRE_BENCH_THREADS=N` in the environment sets the threads; default: every core.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import command
from bench.engine import model
from bench.runner import STORY, Marks, rates
from lacre_backend.engine import gguf_header
from lacre_backend.engine.adapters import AdapterFile, load
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.protocol import Engine, Sampling, Task, Token
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.engine.tokenizer import Tokenizer
from parts.tiny_model import write_gguf

STREAMS: Final = 8
CONTEXT: Final = 1024
RANK: Final = 8
TARGETS: Final = ("attn_q", "attn_k", "attn_v", "attn_output")
HISTORY: Final = 100  # tokens in each slot before the steps that show the cost of a change
# The model of each stream: the base, or an adapter by its number
LOADS: Final = {
    "base": [0] * STREAMS,
    "one": [1] * STREAMS,
    "base_and_one": [i % 2 for i in range(STREAMS)],
    "base_and_two": [i % 3 for i in range(STREAMS)],
}


def adapter(path: Path, base: Path, seed: int) -> AdapterFile:
    """An adapter of random weights, small enough to leave the text a text."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for tensor in gguf_header.read(base).tensors:
        if tensor.name.removesuffix(".weight").split(".")[-1] in TARGETS:
            inner, outer = tensor.shape
            tensors[f"{tensor.name}.lora_a"] = random.normal(0, 0.3, (RANK, inner)) / inner**0.5
            tensors[f"{tensor.name}.lora_b"] = random.normal(0, 0.3, (outer, RANK))
    about = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(RANK)}
    return AdapterFile(path.stem, write_gguf(path, about, tensors), "")


def change_ms(base: Path, adapters: Sequence[AdapterFile], threads: int, rounds: int) -> command.Figures:
    """switch_ms: how much longer a step of 4 sequences takes if the step before was another adapter's. lora_ms: how much longer
    one takes with an adapter than without. Medians.
    """
    loaded = Model(base, name="bench", digest="", n_ctx=CONTEXT, gpu=Gpu(), tokenizer=Tokenizer(base))
    limits = EngineLimits(slots=STREAMS, context=CONTEXT, cells=STREAMS * CONTEXT)
    context = LlamaContext(loaded, limits, Compute(threads), load(loaded, base, adapters))

    def step(name: str | None, position: int, tokens: int = 1) -> float:
        segments = tuple(Segment(slot, position, [7] * tokens, "bench", True) for slot in range(STREAMS // 2))
        after = tuple(Trim(slot, HISTORY) for slot in range(STREAMS // 2))
        began = time.perf_counter()
        context.execute(StepPlan((), segments, after, (), len(segments), (), name))
        context.logits(len(segments))
        return (time.perf_counter() - began) * 1e3

    step(None, 0, HISTORY)
    names = [None, *(each.name for each in adapters)]
    first: dict[str | None, list[float]] = defaultdict(list)
    second: dict[str | None, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name in names:
            first[name].append(step(name, HISTORY))
            second[name].append(step(name, HISTORY))
    context.free()
    changes = [a - b for name in names for a, b in zip(first[name], second[name], strict=True)]
    without = statistics.median(second[None])
    return {
        "switch_ms": round(statistics.median(changes), 2),
        "lora_ms": round(statistics.median(itertools.chain(*(second[each.name] for each in adapters))) - without, 2),
        "step_of_4_ms": round(without, 2),
    }


async def stream(engine: Engine, tokens: int) -> Marks:
    """Ends only at its limit."""
    never = dict.fromkeys((token.id for token in engine.model.control_tokens), -1000.0)
    prompt = tuple(engine.tokenize(secrets.token_hex(8) + " " + STORY))
    task = Task(secrets.token_hex(8), prompt, tokens, sampling=Sampling(temperature=0, logit_bias=never))
    return [time.perf_counter() async for event in engine.submit(task) if isinstance(event, Token)]


async def together(engines: Sequence[Engine], tokens: int) -> dict[str, float]:
    """As `rates`, and the 95th percentile of the time between two tokens of a stream."""
    began = time.perf_counter()
    marks = await asyncio.gather(*(stream(each, tokens) for each in engines))
    begin, end = max(each[0] for each in marks), min(each[-1] for each in marks)
    gaps = [b - a for each in marks for a, b in itertools.pairwise(each) if begin <= a and b <= end]
    return rates(began, marks) | {"gap": statistics.quantiles(gaps, n=20)[-1] * 1e3 if len(gaps) > 1 else 0.0}


def measure(quick: bool) -> command.Figures:
    """Medians over the rounds. n8: tokens per second after the last stream's first token. gap: milliseconds between two tokens
    of a stream, the 95th percentile.
    """
    threads = int(os.environ.get("LACRE_BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
    base = model()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        adapters = [adapter(Path(folder) / f"{name}.gguf", base, seed) for seed, name in enumerate(("legal", "tax"))]
        figures = {"threads": float(threads)} | change_ms(base, adapters, threads, 10 if quick else 40)
        settings = LlamaSettings(n_ctx=CONTEXT, slots=STREAMS, threads=threads, flash=True)
        with closing(LlamaEngine(base, name="bench", digest="", settings=settings, adapters=adapters)) as engine:
            models: list[Engine] = [engine, *engine.adapted]
            for turn in range(3 if quick else 7):
                for name, kinds in list(LOADS.items())[:: 1 if turn % 2 == 0 else -1]:
                    for key, value in asyncio.run(together([models[i] for i in kinds], 48 if quick else 96)).items():
                        found[name, key].append(value)
    for name in LOADS:
        figures[f"{name}_n8"] = round(statistics.median(found[name, "decode"]), 1)
        figures[f"gap_{name}_p95_ms"] = round(statistics.median(found[name, "gap"]), 1)
    for name in list(LOADS)[1:]:
        ratios = [ours / base for ours, base in zip(found[name, "decode"], found["base", "decode"], strict=True)]
        figures[f"{name}_x_base"] = round(statistics.median(ratios), 3)
    return figures


if __name__ == "__main__":
    command.run(__doc__, {"adapters": measure})
