"""Search by meaning: prints the lines of a file that are nearest to a question, by their embeddings. Stores nothing.

python examples/search.py README.md "who can read my prompt?" --model all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lacre

BATCH = 64  # texts of one request


def main() -> None:
    arguments = argparse.ArgumentParser(description="Find what is nearest in meaning.")
    arguments.add_argument("file", type=Path)
    arguments.add_argument("question")
    arguments.add_argument("--model", required=True, help="a model that embeds: `lacre status` lists the models")
    arguments.add_argument("--count", type=int, default=3)
    given = arguments.parse_args()
    lines = [line.strip() for line in given.file.read_text().splitlines() if len(line.strip()) > 20]
    with lacre.OpenAI() as client:
        vectors = []
        for start in range(0, len(lines), BATCH):
            found = client.embeddings.create(model=given.model, input=lines[start : start + BATCH])
            vectors += [item.embedding for item in found.data]
        [asked] = client.embeddings.create(model=given.model, input=[given.question]).data
    nearest = sorted(zip(lines, vectors, strict=True), key=lambda pair: -dot(pair[1], asked.embedding))
    for line, vector in nearest[: given.count]:
        print(f"{dot(vector, asked.embedding):.3f}  {line}")


def dot(one: list[float], other: list[float]) -> float:
    """The cosine, for vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
