"""How fast the worker's own engine serves a model on this machine: `lacre model bench`.

Rules:
- Requests go through the engine as a worker's do: scheduler, sampling and text included. Nothing comes from a cache.
- The median of the rounds is told. Every answer has the same length: no token may end it before.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_backend.engine import shards
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import ModelMetadata
from lacre_backend.engine.protocol import Embedding, Engine, EngineError, Sampling, Task, TaskKind, Token
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.engine.tune import SLOTS
from lacre_backend.models.opening import Conditions, OpenedModel, open_model
from lacre_backend.workshop.child import Job, Report
from lacre_backend.workshop.inspection import check_weights, read_header
from lacre_fabric.keys.kms import PLAIN

ANSWER: Final = 64  # tokens of an answer, as in bench/engine.py
PROMPT: Final = 512  # tokens of the prompt whose reading is timed
ROUNDS: Final = 3
MOST_ROUNDS: Final = 100  # an hour for a small model
_STORY: Final = (
    "Write a long story about the harbour, the lighthouse keeper, and the ship that came back after many years. Begin: "
)
_WORDS: Final = "the sea and the sky are wide and blue at the end of the day "
_NEVER: Final = -1000.0  # added to a logit: below all others
_SPARE: Final = 16  # tokens of a context that are left free


@dataclass(frozen=True, slots=True)
class BenchAsked:
    """path: of the model, or of any of its shards. kms: opens a sealed one. rounds: of which the medians are told."""

    path: Path
    kms: str = PLAIN
    rounds: int = ROUNDS


@dataclass(frozen=True, slots=True)
class StreamRate:
    """streams: requests at a time.

    - tokens_per_second: of all together, reading of prompts included. An embedding model's are the tokens that it read.
    - decode: the same between the last first token and the first last one; None for an embedding model.
    - first_token_ms: from sending all requests, the median of them. For an embedding model, until the vector.
    """

    streams: int
    tokens_per_second: float
    decode: float | None
    first_token_ms: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """- bytes: of all files. slots: requests that the engine serves at a time; more wait.
    - load_seconds: the file may have been in the page cache.
    - prompt_tokens_per_second: of one prompt of `prompt_tokens`.
    """  # fmt: skip

    path: Path
    name: str
    kind: str
    bytes: int
    slots: int
    rounds: int
    load_seconds: float
    rates: list[StreamRate]
    prompt_tokens: int
    prompt_tokens_per_second: float


def bench(asked: BenchAsked, report: Report) -> Benchmark:
    """Raises SettingsError, EngineError or OSError."""
    shards.check_file(asked.path)
    if not 1 <= asked.rounds <= MOST_ROUNDS:
        raise SettingsError(f"--rounds is {asked.rounds}; give 1 to {MOST_ROUNDS}.")
    report("loading", 0.0)
    opened = open_model(asked.path, None, Conditions(asked.kms))
    check_weights(asked.path, map(read_header, shards.files_of(opened.file.path)))
    began = time.perf_counter()
    embeds = ModelMetadata.read(opened.file.path).kind is TaskKind.EMBED
    with closing(_embedder(opened) if embeds else _engine(opened)) as engine:
        seconds = time.perf_counter() - began
        rates, length, prompt = asyncio.run(_measured(engine, asked.rounds, report))
        return Benchmark(
            path=asked.path,
            name=opened.file.name,
            kind="embed" if embeds else "generate",
            bytes=asked.path.stat().st_size if opened.weights else shards.size(asked.path),
            slots=engine.slots,
            rounds=asked.rounds,
            load_seconds=round(seconds, 2),
            rates=rates,
            prompt_tokens=length,
            prompt_tokens_per_second=round(prompt, 1),
        )


BENCH: Final = Job(f"{__name__}:BENCH", BenchAsked, Benchmark, bench)


def _engine(opened: OpenedModel) -> LlamaEngine:
    settings = LlamaSettings(n_ctx=PROMPT + _SPARE, slots=max(SLOTS), beyond_training=True)
    file = opened.file
    return LlamaEngine(file.path, name=file.name, digest=file.digest, settings=settings, weights=opened.weights)


def _embedder(opened: OpenedModel) -> LlamaEmbedder:
    file = opened.file
    return LlamaEmbedder(file.path, name=file.name, digest=file.digest, weights=opened.weights)


async def _measured(engine: Engine, rounds: int, report: Report) -> tuple[list[StreamRate], int, float]:
    """The rates by number of streams, and the tokens and the rate of one prompt."""
    runs: dict[int, list[StreamRate]] = {n: [] for n in SLOTS}
    length = min(PROMPT, engine.model.n_ctx - _SPARE)
    prompts: list[float] = []
    await _batch(engine, 1)  # the first step takes longer
    for number in range(rounds):
        for step, n in enumerate(SLOTS):
            report(f"{n} at a time", (number + step / len(SLOTS)) / rounds)
            runs[n].append(await _batch(engine, n))
        prompts.append(length / await _first(engine, _long(engine, length)))
    return [_median(runs[n]) for n in SLOTS], length, statistics.median(prompts)


async def _batch(engine: Engine, n: int) -> StreamRate:
    """Of n requests at once."""
    story = tuple(engine.tokenize(_STORY))[: engine.model.n_ctx - ANSWER - _SPARE]
    began = time.perf_counter()
    streams = await tasks.together(*(_marks(engine, story, str(number)) for number in range(n)))
    total = sum(map(len, streams))
    first = statistics.median(marks[0] for marks in streams) - began
    whole = max(marks[-1] for marks in streams) - began
    if TaskKind.EMBED in engine.model.kinds:
        return StreamRate(n, len(story) * n / whole, None, first * 1e3)
    begin, end = max(marks[0] for marks in streams), min(marks[-1] for marks in streams)
    inside = sum(begin < mark <= end for marks in streams for mark in marks)
    return StreamRate(n, total / whole, inside / (end - begin) if end > begin else 0.0, first * 1e3)


async def _first(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Seconds to the first token of a prompt, or to its vector."""
    began = time.perf_counter()
    return (await _marks(engine, prompt, "prompt", answer=1))[0] - began


async def _marks(engine: Engine, prompt: tuple[int, ...], name: str, answer: int = ANSWER) -> list[float]:
    """When each token came, or the one vector, by the clock."""
    model = engine.model
    if TaskKind.EMBED in model.kinds:
        before, after = model.frame
        async for event in engine.submit(Task(name, (*before, *prompt, *after), 1, TaskKind.EMBED)):
            if isinstance(event, Embedding):
                return [time.perf_counter()]
        raise EngineError("The engine made no vector. Check the model file.")
    sampling = Sampling(temperature=0, logit_bias=dict.fromkeys((token.id for token in model.control_tokens), _NEVER))
    task = Task(name, prompt, answer, sampling=sampling)
    return [time.perf_counter() async for event in engine.submit(task) if isinstance(event, Token)]


def _long(engine: Engine, length: int) -> tuple[int, ...]:
    text = tuple(engine.tokenize(_WORDS * (length // 8)))
    return text[: length - sum(map(len, engine.model.frame))]


def _median(runs: Sequence[StreamRate]) -> StreamRate:
    decode = [run.decode for run in runs if run.decode is not None]
    return StreamRate(
        runs[0].streams,
        round(statistics.median(run.tokens_per_second for run in runs), 1),
        round(statistics.median(decode), 1) if decode else None,
        round(statistics.median(run.first_token_ms for run in runs), 1),
    )
