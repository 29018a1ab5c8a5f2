"""The parts of an answer: the model's reasoning, its text, and its function calls."""

from __future__ import annotations

from dataclasses import dataclass, field


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


Part = Thought | Speech | Called | Argued
