"""The choices of one request: sequences with the same prompt, which one of them reads for all.

Rules
- Pure: no I/O, no clock, no thread, no llama.cpp.
- One member reads the prompt (`reader`). The others wait beside everybody's turns meanwhile, and take theirs once it is read.
- A member that finds the whole prompt in a sibling's slot copies it and computes nothing of it. Where no slot has it any more,
  the next member reads it anew.
- Members share with each other whatever their scope is: they are one request of one caller. What they share goes with the last.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Choices(Generic[T]):
    """length: tokens of the prompt, with what is begun of the answer. cached: of these, those that the first reader found in
    the cache of its scope; None until it was admitted.
    """

    __slots__ = ("cached", "length", "members", "reader", "waiting")

    def __init__(self, length: int) -> None:
        self.length = length
        self.cached: int | None = None
        self.members = 0  # that did not end
        self.reader: T | None = None
        self.waiting: list[T] = []  # for the reader, in the order of their turns

    def must_wait(self, member: T) -> bool:
        """Whether another one reads the prompt now."""
        return self.reader is not None and self.reader is not member

    def released(self) -> list[T]:
        """The prompt is read, or its reader is gone: those that waited, the first one first."""
        self.reader = None
        waiting, self.waiting = self.waiting, []
        return waiting
