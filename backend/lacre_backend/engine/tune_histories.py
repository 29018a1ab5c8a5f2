"""Sequences that get one token each in a step, as answers do, again and again from the same length.

Rules:
- The state of a recurrent model cannot be cut. There the sequences grow by a token a step, which is little beside their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lacre_backend.engine.context import LlamaContext
from lacre_backend.engine.plan import Segment, StepPlan, Trim

TOKEN: Final = 1  # any token: they all take the same time


class Histories:
    """cuttable: as in `ModelMetadata`. free: the slot after those that have a history."""

    def __init__(self, context: LlamaContext, slots: range, length: int, *, cuttable: bool) -> None:
        """slots: from 0 on. Reads a history of that many tokens in each."""
        self._lengths = dict.fromkeys(slots, length)
        self._cuttable = cuttable
        self.free = len(slots)
        for slot in slots:
            context.execute(StepPlan((), (Segment(slot, 0, (TOKEN,) * length, None, True),), (), (), 0))

    def step(self, slots: Sequence[int]) -> tuple[list[Segment], tuple[Trim, ...]]:
        """A token for each of these slots, and what to cut after the step. Execute both once."""
        segments = [Segment(slot, self._lengths[slot], (TOKEN,), None, True) for slot in slots]
        if self._cuttable:
            return segments, tuple(Trim(segment.slot, segment.start) for segment in segments)
        self._lengths |= {segment.slot: segment.start + 1 for segment in segments}
        return segments, ()
