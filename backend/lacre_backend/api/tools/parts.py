"""The parts of an answer: the model's reasoning, its text, and its function calls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

SHORT_ID: Final = 9  # Mistral's templates take no other length


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning before the answer."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Speech:
    """Text outside of calls."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins. index: among the answer's calls."""

    index: int
    id: str
    name: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str = field(repr=False)


def call_id(seed: str, index: int, *, short: bool = False) -> str:
    """The id of a call. seed: of the answer, random. So each worker that continues the answer gives its calls the same ids."""
    digest = hashlib.sha256(f"{seed}.{index}".encode()).hexdigest()
    return digest[:SHORT_ID] if short else f"call_{digest[:24]}"


Part = Thought | Speech | Called | Argued
