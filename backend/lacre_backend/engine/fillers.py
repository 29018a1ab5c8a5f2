"""Adds filler tokens to a step where it computes faster with them (docs/engine.md, "What tuning finds").

Rules:
- Pure. A filler is in an idle slot, or in one that waits for its adapter's turn. It is removed after the step. It never
  follows cells that were restored for this step: that may fail.
- It lengthens no task's attention: a neighbour's timing must not reveal an idle cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from lacre_backend.engine.plan import EngineLimits, Segment, Trim
from lacre_backend.engine.slots import CacheSlot

PAD: Final = 256  # llama.cpp reads cells in multiples of this many
FILLER: Final = 0  # any token works: its result is ignored


def filled(
    segments: list[Segment], adapter: str | None, slots: Sequence[CacheSlot], limits: EngineLimits, free: int
) -> tuple[tuple[Segment, ...], tuple[Trim, ...]]:
    """Adds fillers in the gaps and up to a round number; also returns how to remove them. adapter: of the step. free: cells.

    A filler is as long as the shortest segment: llama.cpp computes sequences of one length together.
    """
    if len(segments) < 2 or not limits.cuttable:
        return tuple(segments), ()
    longest = max(segment.start + len(segment.tokens) for segment in segments)
    padded = min(-(-longest // PAD) * PAD, limits.context)
    first, last = segments[0].slot, segments[-1].slot
    each = min(len(segment.tokens) for segment in segments)
    usable = [s for s in slots if (s.idle or s.adapter != adapter) and not s.restored and s.length + each <= padded]
    inside = [slot for slot in usable if first < slot.index < last and not limits.unified]
    outside = _outside(usable, first, last, len(slots), unified=limits.unified)
    n = len(segments) + len(inside)
    missing = -n % limits.multiple
    if each == 1 and n > limits.multiple and 0 < missing <= min(limits.multiple // 2, len(outside)):
        inside += outside[:missing]
    if each * len(inside) > min(limits.step, free) - sum(len(segment.tokens) for segment in segments):
        return tuple(segments), ()
    fillers = [Segment(slot.index, slot.length, (FILLER,) * each, None, True) for slot in inside]
    ordered = sorted([*segments, *fillers], key=lambda segment: segment.slot)
    return tuple(ordered), tuple(Trim(filler.slot, filler.start) for filler in fillers)


def _outside(usable: Sequence[CacheSlot], first: int, last: int, slots: int, *, unified: bool) -> list[CacheSlot]:
    """Usable slots that border the running ones; in a unified cache, any."""
    if unified:
        return list(usable)
    known = {slot.index: slot for slot in usable}
    after = itertools.takewhile(known.__contains__, range(last + 1, slots))
    before = itertools.takewhile(known.__contains__, range(first - 1, -1, -1))
    return [known[index] for index in (*after, *before)]
