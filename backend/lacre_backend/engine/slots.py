"""The scheduler's tasks and the slots that they run in, and the orders among them.

Rules: pure. A slot's cells hold the first `length` tokens of its task, and then its drafted ones, if any. Cells that this plan
restores are not read behind before the next plan: the restoring may fail.
"""

from __future__ import annotations

from collections import Counter

from lacre_backend.engine.choices import Choices
from lacre_backend.engine.tokens import NO_TOKENS, Tokens
from lacre_backend.engine.turns import Fair


class QueuedTask:
    """A task from submission to its end, in the queue or in a slot."""

    __slots__ = ("adapter", "cached", "choices", "fair", "generated", "id", "long", "number", "scope", "slot", "tokens")

    def __init__(
        self, task_id: str, tokens: Tokens, scope: bytes | None, fair: Fair, choices: Choices[QueuedTask] | None
    ) -> None:
        self.id = task_id
        self.tokens = tokens
        self.scope = scope
        self.fair = fair
        self.adapter: str | None = None
        self.choices = choices  # of its request, if it has several
        self.generated = 0
        self.cached: int | None = None  # tokens found in the cache at the first admission
        self.long = False  # whether its prompt is read in shares, to its last token, while others generate
        self.slot: CacheSlot | None = None
        self.number = 0  # of the admission; the age order of running tasks


class CacheSlot:
    """One sequence of llama.cpp's cache."""

    __slots__ = ("adapter", "choices", "drafted", "index", "length", "restored", "scope", "task", "tokens", "used")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens = NO_TOKENS  # of the task that runs here, or ran here last
        self.length = 0  # how many of them have their cells here
        self.scope: bytes | None = None
        self.adapter: str | None = None  # that computed its cells
        # The choices whose prompt its cells begin with, while one of them is unfinished
        self.choices: Choices[QueuedTask] | None = None
        self.task: QueuedTask | None = None
        self.used = 0  # when it was last in use, by the scheduler's counter
        self.restored = 0  # cells that this plan brings back for the task, if that succeeds
        self.drafted: tuple[int, ...] = ()  # guesses of the next tokens, whose cells follow; not known to be right yet

    @property
    def idle(self) -> bool:
        return self.task is None

    @property
    def generating(self) -> bool:
        task = self.task
        return task is not None and task.generated > 0 and not self.restored and len(task.tokens) - self.length == 1


def age(slot: CacheSlot) -> int:
    return slot.task.number if slot.task is not None else 0


def cost(slot: CacheSlot, own: int, others: int) -> tuple[bool, int, bool, int, int, int]:
    """Sort key for the idle slot to give away. A prompt that choices may still copy is kept longest. own, others: the slot's
    distances (`placement.py`).

    Next come slots inside or beside the running ones, even if another cache is older: every gap is computed or splits the
    computation. Among several, an empty one, then the farthest from other adapters' tasks, then the longest unused.
    """
    kept = slot.choices is not None and slot.length > 0
    return kept, own, bool(slot.length), -others, slot.used if slot.length else 0, slot.index


def weight(task: QueuedTask, held: Counter[Fair | str], oldest: int) -> tuple[bool, int, int, int]:
    """The task with the greatest key returns to its queue. held: cells, by tenant and by caller."""
    return task.number != oldest, held[task.fair[0]], held[task.fair], task.number


def unread(slot: CacheSlot) -> int:
    """Tokens of the slot's task that are not computed yet, and may be."""
    return 0 if slot.task is None or slot.restored else len(slot.task.tokens) - slot.length
