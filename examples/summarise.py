"""Summarises a text that is longer than the model can read: first its parts, side by side, then the summaries.

python examples/summarise.py docs/wire.md
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path

import lacre

AT_ONCE = 4  # parts; more would only wait in the worker's queue


def parts(text: str, size: int) -> Iterator[str]:
    """Paragraphs, joined up to `size` characters. Longer ones are cut."""
    gathered = ""
    for paragraph in text.split("\n\n"):
        if gathered and len(gathered) + len(paragraph) > size:
            yield gathered
            gathered = ""
        gathered += paragraph + "\n\n"
        while len(gathered) > size:
            yield gathered[:size]
            gathered = gathered[size:]
    if gathered.strip():
        yield gathered


async def summarise(client: lacre.AsyncClient, text: str, size: int, tokens: int) -> str:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(part: str) -> str:
        async with slots:
            reply = await client.chat(f"Summarise in one sentence:\n\n{part}", max_tokens=tokens, temperature=0)
        return reply.text.strip()

    pieces = list(parts(text, size))
    summaries = await asyncio.gather(*map(one, pieces))
    if len(summaries) <= 1:
        return "".join(summaries)
    together = "\n\n".join(summaries)
    # Each round must be shorter than the one before it, or there would be no last one.
    return await summarise(client, together if len(together) < len(text) else together[: len(text) // 2], size, tokens)


async def main() -> None:
    arguments = argparse.ArgumentParser(description="Summarise a long text.")
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--size", type=int, default=6000, help="characters of one part")
    arguments.add_argument("--tokens", type=int, default=80, help="tokens of one summary")
    given = arguments.parse_args()
    async with lacre.AsyncClient() as client:
        print(await summarise(client, given.file.read_text(), given.size, given.tokens))


if __name__ == "__main__":
    asyncio.run(main())
