"""Decides how many guessed tokens a step should check: as many as make it generate fastest, by what steps took so far.

Rules:
- Pure: durations in, numbers of tokens out.
- A guess is checked only if the measured steps promise a gain of `MARGIN`. A number of rows that was not measured counts as no
  dearer than the next smaller one, so it is tried, twice.
- Measurements expire: contexts grow, and machines get other work.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

MARGIN: Final = 1.05  # times the tokens per second without guesses; smaller gains are noise
LASTING: Final = 500  # steps until a measurement that was not renewed is forgotten
_TRIES: Final = 2  # measurements that count; the first may include llama.cpp's planning of memory
_WEIGHT: Final = 0.2  # of a new measurement in the running mean


class Offer(NamedTuple):
    """A task's guesses. right: the probability that one is right if those before it are. most: how many there are."""

    right: float
    most: int


class _Measured:
    __slots__ = ("at", "count", "seconds")

    def __init__(self, seconds: float, at: int) -> None:
        self.seconds = seconds
        self.count = 1
        self.at = at

    def add(self, seconds: float, at: int) -> None:
        self.seconds = min(self.seconds, seconds) if self.count < _TRIES else self.seconds + _WEIGHT * (seconds - self.seconds)
        self.count += 1
        self.at = at


class Gain:
    """The measurements of one engine. most: guessed tokens in a step. even: all sequences of a step should be equally long,
    because each has a cache of its own: llama.cpp computes those of different lengths one after another.
    """

    def __init__(self, most: int, *, even: bool) -> None:
        self._most = most
        self._even = even
        self._steps: dict[int, _Measured] = {}  # by rows
        self._count = 0

    def observe(self, rows: int, seconds: float) -> None:
        """A step that read no prompt. rows: its tokens, guessed ones included."""
        self._count += 1
        if (known := self._steps.get(rows)) is None:
            self._steps[rows] = _Measured(seconds, self._count)
        else:
            known.add(seconds, self._count)
        if self._count % LASTING == 0:
            self._steps = {n: step for n, step in self._steps.items() if self._count - step.at < LASTING}

    def allot(self, offers: Sequence[Offer], each: float = 0.0) -> list[int]:
        """How many guesses to check for each running task. each: seconds of guessing one more for every task."""
        n = len(offers)
        numbers = [0] * n
        plain = self._steps.get(n)
        if plain is None or plain.count < _TRIES or n > self._most:
            return numbers  # the step without guesses is measured first
        known = sorted(rows for rows, step in self._steps.items() if step.count >= _TRIES)
        best = MARGIN * n / plain.seconds
        for added, tokens, depth, found in self._evenly(offers) if self._even else self._singly(offers):
            rate = (n + tokens) / (self._expected(n + added, known) + each * depth)
            if rate > best:
                best, numbers = rate, list(found)
        return numbers

    def _evenly(self, offers: Sequence[Offer]) -> list[tuple[int, float, int, list[int]]]:
        """Every depth: guesses, expected right ones, depth, and the number for each task."""
        n, tokens = len(offers), 0.0
        found: list[tuple[int, float, int, list[int]]] = []
        for depth in range(1, min(max(offer.most for offer in offers), self._most // n) + 1):
            tokens += sum(offer.right**depth for offer in offers if offer.most >= depth)
            found.append((n * depth, tokens, depth, [depth] * n))
        return found

    def _singly(self, offers: Sequence[Offer]) -> list[tuple[int, float, int, list[int]]]:
        """The same, adding the guess that is most probably right each time."""
        heap = [(-offer.right, i) for i, offer in enumerate(offers) if offer.most > 0]
        heapq.heapify(heap)
        numbers, tokens = [0] * len(offers), 0.0
        found: list[tuple[int, float, int, list[int]]] = []
        while heap and len(found) < self._most:
            right, i = heap[0]
            tokens -= right
            numbers[i] += 1
            if numbers[i] < offers[i].most:
                heapq.heapreplace(heap, (right * offers[i].right, i))
            else:
                heapq.heappop(heap)
            found.append((len(found) + 1, tokens, max(numbers), list(numbers)))
        return found

    def _expected(self, rows: int, known: Sequence[int]) -> float:
        """Seconds of a step, between its measured neighbours."""
        at = bisect_left(known, rows)
        if at == len(known):
            return self._steps[known[-1]].seconds
        above = self._steps[known[at]].seconds
        if known[at] == rows or at == 0:
            return above
        below = self._steps[known[at - 1]].seconds
        return below + (above - below) * (rows - known[at - 1]) / (known[at] - known[at - 1])
