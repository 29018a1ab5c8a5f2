"""The choices of one request: sequences with the same prompt, which one of them reads for all.

Rules:
- Pure: no I/O, no clock, no thread, no llama.cpp.
- One member reads the prompt (`reader`). The others wait outside the queue meanwhile, and enter it once the prompt is read.
- A member that finds the whole prompt in a sibling's slot copies it and computes nothing. If no slot has it any longer, the
  next member reads it again.
- Members share cells with each other regardless of scope: they are one request of one caller. The shared cells are released
  with the last member.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Choices(Generic[T]):
    """The choices of one request. length: tokens of the prompt and the begun answer. cached: those of them that the first
    reader found in its scope's cache; None until its admission.
    """

    __slots__ = ("cached", "length", "members", "reader", "waiting")

    def __init__(self, length: int) -> None:
        self.length = length
        self.cached: int | None = None
        self.members = 0  # not ended yet
        self.reader: T | None = None
        self.waiting: list[T] = []  # for the reader, in queue order

    def must_wait(self, member: T) -> bool:
        """Whether another member is reading the prompt."""
        return self.reader is not None and self.reader is not member

    def released(self) -> list[T]:
        """The members that waited, first one first. Call it when the prompt is read or its reader is gone."""
        self.reader = None
        waiting, self.waiting = self.waiting, []
        return waiting
