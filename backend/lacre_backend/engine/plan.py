"""A step of the engine, as the scheduler writes it and the context executes it, and the limits that it keeps.

Rules
- Values only: nothing here decides, and nothing here knows llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lacre.errors import UsageError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """slots: sequences at a time. context: cells of one. cells: cells of all, fewer than `slots * context` in a unified cache.

    step: tokens in a step. chunk: of prompts, while nothing is generated. burst: of short prompts (at most so long) together
    while others generate. share: of long prompts, then; whoever measures may set it anew at any time. multiple: how many
    sequences the kernels take at once. cuttable: whether cells can be taken from the end of a sequence; if not, no prefix is
    reused, and there are no fillers.
    """

    slots: int
    context: int
    cells: int
    unified: bool = False
    step: int = 512
    chunk: int = 256
    burst: int = 128
    share: int = 32
    multiple: int = 1
    cuttable: bool = True

    def __post_init__(self) -> None:
        fits = self.context <= self.cells <= self.slots * self.context
        positive = min(self.slots, self.context, self.share, self.burst, self.chunk) > 0
        rooms = self.slots + self.burst + self.share <= self.step and self.chunk <= self.step
        if not (fits and positive and rooms):
            raise UsageError(f"These limits contradict each other: {self}.")


@dataclass(frozen=True, slots=True)
class Trim:
    """Remove the slot's cells from position `keep` on."""

    slot: int
    keep: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Make `target`, which is empty, hold the first `keep` cells of `source`."""

    source: int
    target: int
    keep: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one slot from position `start` on. output: the last one's logits are wanted. task: None for a filler, whose
    output nobody looks at: it is there because rows of logits come by fours too.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    task: str | None
    output: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first `memory` in its order, then `segments` as one batch, then `after`. generating: tasks that are past
    their prompt. copied: admitted ones whose whole prompt a sibling has read; their first token comes from its logits.
    """

    memory: tuple[Trim | Copy, ...]
    segments: tuple[Segment, ...]
    after: tuple[Trim, ...]
    admitted: tuple[str, ...]
    generating: int
    copied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)
