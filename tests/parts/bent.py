"""What an adversary without a key can do to bytes, and to the pieces of a message: each change stands here once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
Text = TypeVar("Text", bytes, str)


def flipped(data: bytes, place: int = -1, bit: int = 0) -> bytes:
    """With one bit changed. place: of its byte."""
    altered = bytearray(data)
    altered[place] ^= 1 << bit
    return bytes(altered)


def swapped(items: Sequence[T], one: int, other: int) -> list[T]:
    """Two of the items in each other's place."""
    bent = list(items)
    bent[one], bent[other] = bent[other], bent[one]
    return bent


def without(items: Sequence[T], place: int = -1) -> list[T]:
    """All but one."""
    bent = list(items)
    del bent[place]
    return bent


def replaced(items: Sequence[T], place: int, *others: T) -> list[T]:
    """Others, or none, in the place of one."""
    bent = list(items)
    bent[place : place + 1 or None] = others
    return bent


def cut(data: Text, places: Iterable[int]) -> list[Text]:
    """`data` in pieces, some of them perhaps empty. The places are taken modulo its length."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]
