"""Measures whether guessing next tokens makes a model faster on this machine: the same answers with and without, in turns.

Rules:
- Both run in one engine, so they share weights, caches and the machine's other work.
- Two kinds of tasks count alike: those whose answers repeat their prompt, and those that do not.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre.runtime import tasks
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Sampling, Task, Token
from lacre_backend.engine.sizing import SpeculationKind
from lacre_backend.engine.speculation import Speculation, SpeculationCounts

WORTH: Final = 1.05  # times as fast, over one sequence and many: less is noise
HARMLESS: Final = 0.95  # times as fast at the least, for one sequence and for many
ROUNDS: Final = 3
_TOKENS: Final = (16, 64)  # of an answer: the fewest, and the most
_SECONDS: Final = 3.0  # of all answers, one after another: a slow model writes shorter ones

_CODE: Final = """def read_rows(path, limit):
    rows = []
    with open(path, encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for number, row in enumerate(reader):
            if number >= limit:
                break
            rows.append({key.strip().lower(): value for key, value in row.items()})
    return rows
"""
_TEXT: Final = (
    "The harbour of the old town freezes every winter. In January the ice carries people, in February horses, and "
    "in March the harbour master closes the bridges. He writes the thickness of the ice into a book each morning. "
)
# Each ends where the model continues: a chat template would make no difference to the speed
SAMPLES: Final = {
    "copy": f"The file rows.py:\n\n{_CODE}\nThe same file rows.py once more:\n\ndef read_rows(path, limit):\n",
    "edit": f"Before the change:\n\n{_CODE}\nAfter read_rows was renamed to load_rows:\n\ndef load_rows(path, limit):\n",
    "quote": f"A text: {_TEXT}\n\nThe report quotes the text: {_TEXT[:60]}",
    "summary": f"A text: {_TEXT}\n\nWhat the text says, in other words: The harbour",
    "story": "Once upon a time a lighthouse keeper found a letter on the beach. She",
    "facts": "Photosynthesis works as follows. First, the leaves of a plant",
}


@dataclass(frozen=True, slots=True)
class SpeculationTrial:
    """What guessing gained. gains: how many times as fast, by number of sequences."""

    kind: SpeculationKind
    gains: dict[int, float]
    counts: SpeculationCounts

    @property
    def gain(self) -> float:
        """Over all numbers of sequences."""
        return statistics.geometric_mean(self.gains.values())

    @property
    def worth_it(self) -> bool:
        return self.gain >= WORTH and min(self.gains.values()) >= HARMLESS

    def __str__(self) -> str:
        gains = ", ".join(f"{gain:.2f} times as fast with {n}" for n, gain in self.gains.items())
        accepted = f"{self.counts.accepted} of {self.counts.guessed} guesses right ({self.counts.acceptance:.0%})"
        return f"speculation {self.kind}: {gains}; {accepted}"


def try_speculation(
    engine: LlamaEngine,
    speculation: Speculation,
    kind: SpeculationKind,
    streams: Sequence[int],
    *,
    samples: Sequence[str] = tuple(SAMPLES.values()),
    rounds: int = ROUNDS,
) -> SpeculationTrial:
    """speculation: the engine's. streams: numbers of concurrent sequences. It runs an event loop of its own."""
    return asyncio.run(_try(engine, speculation, kind, streams, [list(samples)] * rounds))


async def _try(
    engine: LlamaEngine,
    speculation: Speculation,
    kind: SpeculationKind,
    streams: Sequence[int],
    rounds: Sequence[Sequence[str]],
) -> SpeculationTrial:
    speculation.enabled, samples = False, rounds[0]
    await _rate(engine, samples, 1, _TOKENS[0])  # llama.cpp plans its memory
    fitting = int(await _rate(engine, samples, 1, _TOKENS[0]) * _SECONDS / len(samples))
    tokens = max(_TOKENS[0], min(fitting, _TOKENS[1]))
    before, gains = speculation.counts, {}
    for n in streams:
        ratios = []
        speculation.enabled = True
        await _rate(engine, samples, n, tokens)  # it learns what steps take
        for texts in rounds:
            speculation.enabled = False
            without = await _rate(engine, texts, n, tokens)
            speculation.enabled = True
            ratios.append(await _rate(engine, texts, n, tokens) / without)
        gains[n] = statistics.median(ratios)
    return SpeculationTrial(kind, gains, speculation.counts.since(before))


async def _rate(engine: LlamaEngine, samples: Sequence[str], streams: int, tokens: int) -> float:
    """Tokens per second of all samples. streams: how many run at a time; each sample runs at least once."""
    count = -(-max(streams, len(samples)) // len(samples)) * len(samples)
    waiting = itertools.islice(itertools.cycle(samples), count)
    made = 0

    async def stream(number: int) -> None:
        nonlocal made
        for at, text in enumerate(waiting):
            prompt = tuple(engine.tokenize(text))
            task = Task(f"trial-{number}-{at}", prompt, tokens, sampling=Sampling(temperature=0))
            async for event in engine.submit(task):
                made += isinstance(event, Token)

    began = time.perf_counter()
    await tasks.together(*(stream(number) for number in range(streams)))
    return made / (time.perf_counter() - began)
