"""A fuzz target: one parser, what it may raise, and how much memory an input may cost.

The invariant of every target: nothing escapes but the kinds of error that are documented, memory stays in proportion to the
input, and whatever else the target itself asserts. This file needs no fuzzer, so that the corpus can be replayed anywhere.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from lacre.errors import LacreError

# Bytes that any input may cost: a limit's worth of headers, and what Python caches at a first call.
MEMORY_FLOOR: Final = 2**20
# And for each of its own bytes: JSON's two-byte `[]` becomes an empty list of 56 and its place in another of 8.
MEMORY_FACTOR: Final = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """parse: takes the input; may raise `refuses` and nothing else. holds: what must be true of what it returned; there
    nothing may be raised. max_length: of the inputs that a fuzzer makes. json: whether they hold JSON, so that the fuzzer is
    given its words. floor: bytes that any input may cost, where a bound of its own stands in place of a proportion.
    """

    name: str
    parse: Callable[[bytes], Any]
    refuses: tuple[type[LacreError], ...]
    holds: Callable[[bytes, Any], None] = lambda _data, _parsed: None
    max_length: int = 4096
    json: bool = False
    floor: int = MEMORY_FLOOR

    def check(self, data: bytes) -> None:
        """Raises AssertionError, or whatever escaped, where an invariant does not hold."""
        try:
            parsed = self.parse(data)
        except self.refuses:
            return
        self.holds(data, parsed)

    def check_memory(self, data: bytes) -> None:
        """`check`, and that Python's allocations stay in proportion to the input: several times slower.

        An input that costs too much is tried again: the first of its kind may have loaded a module, which is not its cost.
        """
        allowed = self.floor + MEMORY_FACTOR * len(data)
        peak = self._peak(data)
        if peak > allowed:
            peak = self._peak(data)
        assert peak <= allowed, f"{len(data)} bytes of input cost {peak} bytes of memory, over {allowed}"

    def _peak(self, data: bytes) -> int:
        """Bytes that Python allocated at most, at once."""
        tracemalloc.start()
        try:
            self.check(data)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class Script:
    """Decisions read from an input, one after the other; zeros and empty bytes once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self._take(size), "big")

    def text(self) -> bytes:
        """After its length in two bytes."""
        return self._take(self.number(2))

    def rest(self) -> bytes:
        return self._take(len(self._data) - self._position)

    def cuts(self) -> tuple[int, ...]:
        """Up to seven places at which to cut a message in pieces."""
        return tuple(self.number(2) for _ in range(self.number() % 8))

    def _take(self, size: int) -> bytes:
        start = self._position
        self._position = min(start + size, len(self._data))
        return self._data[start : self._position]


def outcome(parse: Callable[[], T], refuses: tuple[type[LacreError], ...]) -> T | type[LacreError]:
    """What came out, or the kind of refusal, so that two ways of feeding the same bytes can be compared."""
    try:
        return parse()
    except refuses as error:
        return type(error)
