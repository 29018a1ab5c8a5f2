"""Does leaving a document out find the one that an answer rests on? Beside the nearest document by embedding, and chance.

40 questions, each with 6 or 7 short documents about one invented thing. One document holds the answer, so the right one is
known. A hit: the right document comes first. The model explains its own greedy answer, and the right answer as given.
all-MiniLM-L6-v2 picks the document whose vector is nearest to the question's. It is the tests' own:

    PYTHONPATH=tests .venv/bin/python -m bench.attribution [--model FILE]

The default is the default model. A FILE needs a chat template; `gguf-new-metadata --chat-template` gives one to a base model.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np

from bench import command
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.models import gguf
from parts.minilm import NAME, minilm

COUNT: Final = 40
SEED: Final = 14
MODEL: Final = "--model"
MAX_TOKENS: Final = 12  # of the model's own answer
CONFIDENCE: Final = 0.05  # the probability that chance alone hits so often
PEOPLE: Final = ("Helena Brandt", "Tomas Okoye", "Mira Lindqvist", "Jonas Pereira", "Aiko Varga", "Rui Halloran", "Ines Kowal")
PLACES: Final = ("Lisbon", "Tromsø", "Valparaíso", "Ghent", "Cardiff", "Izmir", "Quebec")
THINGS: Final = ("Museum of Tides", "Harbour Library", "Northern Observatory", "Glass Theatre", "Salt Archive")
MATERIALS: Final = ("copper", "cedar", "slate", "granite", "zinc")
NUMBERS: Final = ("twelve", "nineteen", "forty", "seventy", "three hundred", "four thousand")

# A document, a question that it answers in other words, and the answer. {x}: the thing, {v}: the value.
FACTS: Final = (
    ("The {x} opened its doors in {v}.", "When did the {x} open?", "It opened in {v}.", tuple(map(str, range(1871, 1978, 9)))),
    ("The first director of the {x} was {v}.", "Who led the {x} at the beginning?", "It was {v}.", PEOPLE),
    ("A ticket for the {x} costs {v} euros.", "How much does it cost to visit the {x}?", "It costs {v} euros.", NUMBERS),
    ("The roof of the {x} is made of {v}.", "Which material covers the {x}?", "It is {v}.", MATERIALS),
    ("The oldest pieces of the {x} came from {v}.", "Where do the oldest pieces come from?", "They come from {v}.", PLACES),
    ("{v} paid for the east wing of the {x}.", "Who financed the east wing?", "{v} did.", PEOPLE),
    ("The reading room of the {x} has {v} seats.", "How many readers can sit there?", "There are {v} seats.", NUMBERS),
    ("The café of the {x} is run by {v}.", "Who serves the coffee there?", "{v} does.", PEOPLE),
    ("The {x} has a branch in {v}.", "In which other city can visitors find it?", "In {v}.", PLACES),
    ("The stairs of the {x} were cut from {v}.", "What are the stairs made of?", "They are {v}.", MATERIALS),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planted:
    """One set. value: what the right answer must name. right: the place of the document that holds it."""

    documents: tuple[str, ...]
    question: str
    answer: str
    value: str
    right: int


def planted(count: int) -> list[Planted]:
    """The same sets each time. Each fact is asked for equally often, and the right document stands anywhere."""
    chance = random.Random(SEED)
    sets = []
    for number in range(count):
        asked, thing, size = number % len(FACTS), chance.choice(THINGS), chance.choice((6, 7))
        others = chance.sample([i for i in range(len(FACTS)) if i != asked], size - 1)
        kinds = [*others, asked]
        chance.shuffle(kinds)
        values: dict[int, str] = {}
        for i in kinds:  # a value stands in one document only, or two would hold the answer
            values[i] = chance.choice([value for value in FACTS[i][3] if value not in values.values()])
        documents = tuple(FACTS[i][0].format(x=thing, v=values[i]) for i in kinds)
        _, question, answer, _ = FACTS[asked]
        value = values[asked]
        sets.append(Planted(documents, question.format(x=thing), answer.format(v=value), value, kinds.index(asked)))
    return sets


def least_above_chance(sizes: Sequence[int]) -> int:
    """The fewest hits that picking at random reaches with a probability of at most `CONFIDENCE`. sizes: documents of each."""
    hits = np.ones(1)
    for size in sizes:
        hits = np.convolve(hits, [1 - 1 / size, 1 / size])
    above = np.cumsum(hits[::-1])[::-1]  # P(at least so many)
    return int(np.argmax(above <= CONFIDENCE))


async def top(client: httpx2.AsyncClient, model: str, one: Planted, answer: str | None) -> tuple[int, str]:
    """The place of the document with the greatest drop, and the answer that was explained."""
    content: list[dict[str, str]] = [
        {"type": "text", "id": str(i), "text": f"{text}\n\n"} for i, text in enumerate(one.documents)
    ]
    content.append({"type": "text", "text": one.question})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "answer": answer, "max_tokens": MAX_TOKENS}
    # One salt a set: the runs share what their prompts begin with.
    salt = {"lacre-cache-salt": f"{hash(one):x}"}
    response = await client.post("/v1/explain", json=body, headers=salt, timeout=600)
    told: dict[str, Any] = response.raise_for_status().json()
    return int(max(told["parts"], key=lambda part: part["drop"])["id"]), told["answer"]


async def nearest(client: httpx2.AsyncClient, one: Planted) -> int:
    response = await client.post("/v1/embeddings", json={"model": NAME, "input": [one.question, *one.documents]}, timeout=600)
    asked, *found = [np.array(entry["embedding"]) for entry in response.raise_for_status().json()["data"]]
    return int(np.argmax([vector @ asked for vector in found]))


async def _measured(count: int, path: Path | None) -> command.Figures:
    file, settings = gguf.find(path), LlamaSettings(n_ctx=1024, threads=1)
    sets = planted(count)
    rows: list[tuple[bool, bool, bool, bool]] = []  # of each set: hits by each way, and whether the own answer is right
    with (
        closing(LlamaEngine(file.path, name=file.name, digest=file.digest, settings=settings)) as engine,
        closing(LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))) as embedder,
    ):
        transport = httpx2.ASGITransport(app=create_app([engine, embedder]))
        async with httpx2.AsyncClient(transport=transport, base_url="http://bench") as client:
            for one in sets:
                place, answer = await top(client, file.name, one, None)
                given, _ = await top(client, file.name, one, one.answer)
                near = await nearest(client, one)
                right = one.value.lower() in answer.lower()
                rows.append((place == one.right, given == one.right, near == one.right, right))
                print(f"{len(rows):4} of {count}: own, given, nearest, correct = {rows[-1]}", file=sys.stderr, flush=True)
    sizes = [len(one.documents) for one in sets]
    return {
        "sets": count,
        "chance": round(sum(1 / size for size in sizes), 1),
        "least_above_chance": least_above_chance(sizes),
        "own_answer_hits": sum(own for own, *_ in rows),
        "own_answers_correct": sum(right for *_, right in rows),
        "correct_answer_hits": sum(own and right for own, *_, right in rows),
        "given_answer_hits": sum(given for _, given, *_ in rows),
        "nearest_embedding_hits": sum(near for *_, near, _ in rows),
    }


def measure(path: Path | None, quick: bool) -> command.Figures:
    """Hits, of as many sets. path: of the model; None: the default one."""
    return asyncio.run(_measured(8 if quick else COUNT, path))


def _model(arguments: list[str]) -> Path | None:
    """Takes `--model FILE` out of the arguments."""
    if MODEL not in arguments:
        return None
    at = arguments.index(MODEL)
    _, file = arguments[at : at + 2]
    del arguments[at : at + 2]
    return Path(file)


if __name__ == "__main__":
    command.run(__doc__, {"attribution": partial(measure, _model(sys.argv))})
