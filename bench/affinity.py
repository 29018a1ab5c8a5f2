"""What blind affinity gives: cached tokens and time to the first token of later turns, over several workers and over one.

One gateway with real NATS and real workers (one thread each). Eight conversations of six turns, one request at a time, each
conversation's next turn after all others'. The deployments stand side by side and take turns by conversation turn: four
workers, one worker, and four workers with `affinity=False`. The parts come from the tests:

    PYTHONPATH=tests .venv/bin/python -m bench.affinity

- `cached_share_*`: cached tokens of the prompts' tokens, turns 2 to 6. `first_token_*_ms`: the median of the same turns.
- `cached_ratio`, `first_token_ratio`: four workers, of one worker. The goal is within 10 %.
- `other_caller_auc`: a victim asks once. Another caller then asks the victim's words and words of the same length that nobody
  asked, in random order. The figure is the probability that the first is answered sooner: 0.5 says nothing to an observer.
  The goal is 0.4 to 0.6. `other_caller_cached` counts the tokens that this caller found cached of either: 0.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from bench import command
from bench.engine import auc
from parts.stage.live import LiveStage
from parts.talks import Talk, several_workers

CONVERSATIONS, TURNS = 8, 6
WORDS: Final = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty", "knoll", "ledge")
ASKED: Final = (
    "Tell me about the first of these words, and about where one finds such a thing in the country.",
    "Which of them is the oldest, and who gave it its name in the beginning?",
    "Compare two of them, and say which you would rather see on a rainy day.",
    "What would a child say about the last of them, standing before it for the first time?",
    "Where should I go to see all of them on one day without a car?",
    "Thank you. Which of them did we leave out, and why was that?",
)


def beginning(drawn: random.Random) -> str:
    """A system prompt that no other one shares a beginning with. All have the same number of words."""
    return f"{' '.join(drawn.choices(WORDS, k=60))}. Answer in one sentence, with one of these words."


async def measured(pairs: int, sets: int) -> command.Figures:
    drawn = random.Random(7)
    kinds = {"four_workers": True, "one_worker": True, "four_workers_off": False}
    talks: dict[str, list[Talk]] = {kind: [] for kind in kinds}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lacre-bench-")))
        four = await stack.enter_async_context(several_workers(folder / "four", 4, CONVERSATIONS))
        one = await stack.enter_async_context(several_workers(folder / "one", 1, CONVERSATIONS))
        lives = {"four_workers": four, "one_worker": one, "four_workers_off": four}
        clients = {kind: lives[kind].client(lives[kind].token(f"{kind}-user"), affinity=on) for kind, on in kinds.items()}
        for client in clients.values():
            await client.chat("Hello.", max_tokens=1)
        await asyncio.sleep(1.5)
        for _ in range(sets):
            held: dict[str, list[Talk]] = {kind: [] for kind in kinds}
            for _ in range(CONVERSATIONS):
                for kind in kinds:
                    held[kind].append(Talk.of(beginning(drawn)))
            for asked in ASKED:
                for number in range(CONVERSATIONS):
                    for kind in drawn.sample(list(kinds), len(kinds)):
                        await held[kind][number].turn(clients[kind], asked)
            for kind in kinds:
                talks[kind] += held[kind]
        known, unknown, found = await watched(four, drawn, pairs)
    figures: command.Figures = {}
    for kind, all_of_it in talks.items():
        later = [talk for talk in all_of_it if len(talk.cached) == TURNS]
        share = sum(sum(talk.cached[1:]) for talk in later) / sum(sum(talk.prompts[1:]) for talk in later)
        figures[f"cached_share_{kind}"] = round(share, 3)
        figures[f"first_token_{kind}_ms"] = round(statistics.median(ms for talk in later for ms in talk.first[1:]), 1)
    figures["cached_ratio"] = round(figures["cached_share_four_workers"] / figures["cached_share_one_worker"], 3)
    figures["first_token_ratio"] = round(figures["first_token_four_workers_ms"] / figures["first_token_one_worker_ms"], 3)
    return figures | {"other_caller_auc": round(auc(known, unknown), 3), "other_caller_cached": float(found)}


async def watched(live: LiveStage, drawn: random.Random, pairs: int) -> tuple[list[float], list[float], int]:
    """Times to the first token of another caller: of words that a victim asked, and of words that nobody did."""
    victim, other = live.client(live.token("victim")), live.client(live.token("other"))
    known: list[float] = []
    unknown: list[float] = []
    found = 0
    for _ in range(pairs):
        secret, made_up = beginning(drawn), beginning(drawn)
        await Talk.of(secret).turn(victim, ASKED[0], 1)
        for words, into in drawn.sample([(secret, known), (made_up, unknown)], 2):
            talk = Talk.of(words)
            await talk.turn(other, ASKED[0], 1)
            into.append(talk.first[0])
            # The chat template's own first tokens are alike for all of one caller's chats, and not secret.
            found += max(0, talk.cached[0] - 24)
    return known, unknown, found


def measure(quick: bool) -> command.Figures:
    return asyncio.run(measured(20 if quick else 150, 1 if quick else 3))


if __name__ == "__main__":
    command.run(__doc__, {"affinity": measure})
