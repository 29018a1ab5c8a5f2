"""One step of the engine: the scheduler writes it and the context executes it. Also the limits that it keeps.

Rules:
- Values only. Nothing here decides or depends on llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre.errors import UsageError

# Tokens, for a CPU where `lacre worker tune` measured nothing
STEP: Final = 512
CHUNK: Final = 256
BURST: Final = 128
SHARE: Final = 32


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits that the scheduler keeps.

    - slots: parallel sequences. context: cells of one. cells: of all, fewer than `slots * context` in a unified cache.
    - step: tokens in a step. chunk: tokens of prompts, while nothing is generated.
    - burst: tokens of all short prompts (of at most this length) while others generate.
    - share: tokens of long prompts, before anything is measured (`pace.py`).
    - multiple: how many sequences the kernels process at once.
    - drafts: drafted tokens of all tasks in a step that reads no prompt.
    - cuttable: whether cells can be removed from the end of a sequence; if not, no prefix is reused and there are no fillers.
    - saved: cells of idle caches that are kept outside of the context's own (`saved.py`).
    """

    slots: int
    context: int
    cells: int
    unified: bool = False
    step: int = STEP
    chunk: int = CHUNK
    burst: int = BURST
    share: int = SHARE
    multiple: int = 1
    cuttable: bool = True
    drafts: int = 0
    saved: int = 0

    def __post_init__(self) -> None:
        fits = self.context <= self.cells <= self.slots * self.context
        positive = min(self.slots, self.context, self.share, self.burst, self.chunk) > 0
        rooms = self.slots + max(self.burst + self.share, self.drafts) <= self.step and self.chunk <= self.step
        savable = self.saved == 0 or (self.cuttable and not self.unified and self.saved > 0)
        if not (fits and positive and rooms and savable):
            raise UsageError(f"These limits contradict each other: {self}.")

    @property
    def most(self) -> int:
        """Tokens of long prompts while others generate, if they cost almost nothing."""
        return min(self.chunk, self.step - self.slots - self.burst)


@dataclass(frozen=True, slots=True)
class Trim:
    """Removes the slot's cells from position `keep` on."""

    slot: int
    keep: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies the first `keep` cells of `source` to `target`, which is empty."""

    source: int
    target: int
    keep: int


@dataclass(frozen=True, slots=True)
class Save:
    """Keeps a copy of the slot's `length` cells outside of the context. number: of the copy. scope, adapter: whose cells."""

    slot: int
    number: int
    length: int
    scope: bytes
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Restore:
    """Fills the slot, which is empty, with the first `keep` of a copy's `length` cells, for a task of this scope and adapter.

    If it fails, the slot is empty, and the task must be `lost`. No segment of the same plan depends on it.
    """

    slot: int
    number: int
    length: int
    keep: int
    task: str
    scope: bytes
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Discard:
    """Removes a copy."""

    number: int


MemoryStep = Trim | Copy | Save | Restore | Discard


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one slot from position `start` on. output: whether the last one's logits are needed. task: None for a filler. A
    filler has an unused output, because rows of logits are also processed in fours. drafted: how many of the last tokens are
    guesses. Then their logits are needed too, and those of the token before them.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    task: str | None
    output: bool
    drafted: int = 0

    @property
    def rows(self) -> int:
        """How many rows of logits it has."""
        return 1 + self.drafted if self.output else 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: `memory` in order, then `segments` as one batch, then `after`. generating: tasks that are past their prompt.
    copied: admitted tasks whose whole prompt a sibling has read; their first token comes from its logits. adapter: of all
    segments' tasks; None: the base model alone.
    """

    memory: tuple[MemoryStep, ...]
    segments: tuple[Segment, ...]
    after: tuple[Trim, ...]
    admitted: tuple[str, ...]
    generating: int
    copied: tuple[str, ...] = ()
    adapter: str | None = None

    @property
    def drafted(self) -> int:
        """Guessed tokens of all tasks."""
        return sum(segment.drafted for segment in self.segments)

    @property
    def attended(self) -> int:
        """For each token of a prompt, the tokens before it, added up."""
        prompts = (each for each in self.segments if each.task is not None and not (each.output and len(each.tokens) == 1))
        return sum(len(each.tokens) * (2 * each.start + len(each.tokens)) // 2 for each in prompts)

    @property
    def size(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)
