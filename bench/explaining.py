"""How much an explanation slows another caller's stream: the gaps between its tokens, alone and beside each kind.

    PYTHONPATH=tests .venv/bin/python -m bench.explaining

The default model on one thread. 16 parts of about 15 tokens are explained, or a lens reads 32 tokens of an answer. The rounds
alternate, and each figure is the median of all rounds. `largest` is of a whole stream of 60 tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from contextlib import closing
from typing import Any, Final

import httpx2

from bench import command
from bench.attribution import planted
from lacre.wire.outer import MAX_PARTS
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Sampling, Task, Token
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.models import gguf

TOKENS: Final = 60
HEAD_START: Final = 0.3  # seconds until the explanation is under way
_ids = itertools.count()


async def gaps(engine: LlamaEngine) -> list[float]:
    """Milliseconds between the tokens of a stream."""
    prompt = tuple(engine.tokenize("Once upon a time there was a"))
    task = Task(id=f"s{next(_ids)}", prompt=prompt, max_tokens=TOKENS, sampling=Sampling(temperature=0), fair=("s", "s"))
    times = [time.perf_counter() async for event in engine.submit(task) if isinstance(event, Token)]
    return [1000 * (after - before) for before, after in itertools.pairwise(times)]


def asked(model: str, kind: str) -> dict[str, Any]:
    one = planted(1)[0]
    documents = [f"{text}\n" for text in itertools.islice(itertools.cycle(one.documents), MAX_PARTS)]
    parts = [{"type": "text", "id": str(i), "text": text} for i, text in enumerate(documents)] if kind == "parts" else []
    content = [*parts, {"type": "text", "text": one.question}]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "answer": one.answer * 8, "lens": kind == "lens",
    }  # fmt: skip


async def _measured(rounds: int) -> command.Figures:
    file = gguf.find()
    settings = LlamaSettings(n_ctx=4096, threads=1)
    found: dict[str, list[list[float]]] = {"alone": [], "parts": [], "lens": []}
    with closing(LlamaEngine(file.path, name=file.name, digest=file.digest, settings=settings)) as engine:
        transport = httpx2.ASGITransport(app=create_app([engine]))
        async with httpx2.AsyncClient(transport=transport, base_url="http://bench", timeout=600) as client:
            await gaps(engine)
            for _ in range(rounds):
                found["alone"].append(await gaps(engine))
                for kind in ("parts", "lens"):
                    explaining = asyncio.create_task(client.post("/v1/explain", json=asked(file.name, kind)))
                    await asyncio.sleep(HEAD_START)
                    found[kind].append(await gaps(engine))
                    (await explaining).raise_for_status()
    return {
        f"{kind}_{name}_ms": round(statistics.median(map(measure, each)), 1)
        for kind, each in found.items()
        for name, measure in (("median", statistics.median), ("largest", max))
    }


def measure(quick: bool) -> command.Figures:
    return asyncio.run(_measured(1 if quick else 5))


if __name__ == "__main__":
    command.run(__doc__, {"explaining": measure})
