"""The clients: a program of its own that asks at a steady rate, whatever becomes of the answers, and writes down what did.

`python -m chaos.load PLAN OUT`: PLAN is the JSON of a `Plan`; OUT gets a line of JSON for each request that ended, and one for
each proof that came with an answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import httpx2

import lacre
from lacre.evidence import audit_proof

# Seconds from the call to its end, whole or in an error. What did not run is sent again for 30 s (`lacre.exchange.retry`),
# the last try takes 15 s at most, resuming a stream 15 s and a last try more, and an answer takes its time on a machine that
# is busy.
DEADLINE: Final = 90.0
STEP: Final = 15.0
HUNG: Final = 2 * DEADLINE  # after which it is ended, and counted as one that would never have
KINDS: Final = {"streamed": 45, "whole": 30, "long": 10, "cancelled": 15}
MODELS: Final = {"echo": 85, "smollm2-135m": 15}
WORDS: Final = ("mare", "nostrum", "aestus", "procella", "portus", "nauta", "velum", "ancora")
LONG: Final = 30  # words; four seconds at the pace of an echo
TOKENS: Final = {"streamed": 16, "whole": 16, "long": 60, "cancelled": 60}  # of the real model


@dataclass(frozen=True, slots=True)
class Plan:
    """url, tokens: what clients are given, a client a token. rate: requests in a second."""

    url: str
    tokens: tuple[str, ...]
    seed: int
    seconds: float
    rate: float


@dataclass(slots=True)
class Ended:
    """How one request ended. at, took: seconds, the first on the monotonic clock. how: whole, cancelled, error or hung.

    error: the type's name, and the problem of a refusal. typed: it is one of Lacre's, with a remedy. right: the answer is the
    one that was asked for, as far as that is known. receipts: digest, prompt, cached and completion tokens of each. resumed:
    how often another worker went on.
    """

    number: int
    kind: str
    model: str
    at: float
    took: float = 0.0
    how: str = "hung"
    error: str = ""
    typed: bool = True
    right: bool = True
    resumed: int = 0
    receipts: list[tuple[str, int, int, int]] = field(default_factory=list)


class Kept(httpx2.AsyncHTTPTransport):
    """Writes down the proof of whatever came back, whole or not, answer or refusal."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if audit_proof.HEADER in response.headers:
            print(json.dumps({"proof": response.headers[audit_proof.HEADER]}), file=self._out, flush=True)
        return response


class Caller:
    """One of them, with a memory of its own."""

    def __init__(self, plan: Plan, token: str, out: TextIO) -> None:
        self._client = lacre.AsyncClient(
            plan.url, token=token, timeout=STEP, memory=lacre.VersionMemory(), transport=Kept(out), shape="none"
        )

    async def ask(self, ended: Ended, said: str) -> None:
        ended.at = time.monotonic()
        try:
            async with asyncio.timeout(HUNG):
                await self._ask(ended, said)
        except lacre.LacreError as exc:
            ended.how, ended.error, ended.typed = "error", _named(exc), bool(exc.remedy)
        except TimeoutError:
            ended.how = "hung"
        except Exception as exc:  # noqa: BLE001 - whatever else comes out of a client is what is looked for here
            ended.how, ended.error, ended.typed = "error", type(exc).__name__, False
        ended.took = time.monotonic() - ended.at

    async def _ask(self, ended: Ended, said: str) -> None:
        limit = {"model": ended.model, "max_tokens": TOKENS[ended.kind] if ended.model != "echo" else 400}
        if ended.kind == "whole":
            reply = await self._client.chat(said, **limit)
            text, receipts = reply.text, [reply.receipt]
        else:
            stream = self._client.chat_stream(said, **limit)
            pieces = []
            async for piece in stream:
                pieces.append(piece)
                if ended.kind == "cancelled" and len(pieces) == 5:
                    await stream.aclose()
                    ended.how, ended.right = "cancelled", _right(ended.model, said, "".join(pieces), whole=False)
                    return
            text, receipts = "".join(pieces), list(stream.receipts)
            ended.resumed = len(stream.parts)
        ended.how, ended.right = "whole", _right(ended.model, said, text, whole=True)
        ended.receipts = [(r.enc, r.prompt_tokens, r.cached_tokens, r.completion_tokens) for r in receipts]

    async def close(self) -> None:
        await self._client.aclose()


def _named(error: lacre.LacreError) -> str:
    name = type(error).__name__
    return f"{name} ({re.split(r'[:#]', error.problem)[-1]})" if isinstance(error, lacre.errors.RefusedError) else name


def _right(model: str, said: str, text: str, *, whole: bool) -> bool:
    """An echo says what was said; of what the real model says, only that it says something is known."""
    if model != "echo":
        return bool(text)
    return text == said if whole else said.startswith(text)


def _drawn(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _questions(plan: Plan) -> Iterable[tuple[Ended, str]]:
    chance = random.Random(plan.seed)
    for number in range(int(plan.seconds * plan.rate)):
        ended = Ended(number, _drawn(chance, KINDS), _drawn(chance, MODELS), 0.0)
        words = LONG if ended.kind == "long" else chance.randint(2, 6)
        yield ended, " ".join(chance.choices(WORDS, k=words))


async def main(plan: Plan, out: TextIO) -> None:
    callers = [Caller(plan, token, out) for token in plan.tokens]
    began = time.monotonic()

    async def one(ended: Ended, said: str) -> None:
        await callers[ended.number % len(callers)].ask(ended, said)
        print(json.dumps({"ended": asdict(ended)}), file=out, flush=True)

    async with asyncio.TaskGroup() as group:
        for ended, said in _questions(plan):
            await asyncio.sleep(max(0.0, began + ended.number / plan.rate - time.monotonic()))
            group.create_task(one(ended, said))
    for caller in callers:
        await caller.close()


def read(path: Path) -> tuple[list[Ended], list[str]]:
    """What was written down: how requests ended, and the proofs."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    ends = [Ended(**line["ended"]) for line in lines if "ended" in line]
    for end in ends:
        end.receipts = [(enc, prompt, cached, completion) for enc, prompt, cached, completion in end.receipts]
    return ends, [line["proof"] for line in lines if "proof" in line]


if __name__ == "__main__":
    with Path(sys.argv[2]).open("w") as file:
        asyncio.run(main(Plan(**json.loads(Path(sys.argv[1]).read_text())), file))
