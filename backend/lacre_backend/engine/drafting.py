"""The interface of what guesses next tokens: prompt lookup (`lookup.py`) or a small model (`draft_model.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from lacre_backend.engine.tokens import Tokens

# Guessed tokens of one task in a step: few enough that a segment stays below `PIECE` of the scheduler, so that a token's logits
# do not depend on the others. Longer guesses are rarely right.
MAX_DRAFT: Final = 15
MOST: Final = 64  # of all tasks in a step: each needs a row of logits, which takes 1 MB for the largest vocabularies


class Wanted(NamedTuple):
    """A generating task. tokens: all so far. most: how many more may be guessed. able: whether its guesses can be checked."""

    id: str
    tokens: Tokens
    most: int
    able: bool


class Drafter(Protocol):
    """Only the decode thread uses it."""

    @property
    def seconds(self) -> float:
        """What one more guess for every task takes, as measured; 0 if it costs almost nothing."""
        ...

    def draft(self, wanted: Sequence[Wanted]) -> dict[str, list[int]]:
        """Guesses by task, at most as many as each wants."""
        ...

    def forget(self, task_id: str) -> None:
        """The task is over."""
        ...

    def wipe(self) -> None:
        """Nothing runs: overwrites the rest of tasks' tokens."""
        ...

    def close(self) -> None: ...
