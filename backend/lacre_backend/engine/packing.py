"""Chooses which waiting texts go into an encoder's next batch.

Rules:
- Pure: no I/O, no clock, no thread, no llama.cpp.
- Tenants take turns, and so do the callers of a tenant, by the tokens computed for them (`turns.py`). So one caller's thousand
  texts, or long texts, do not delay another's single one.
- One caller's texts keep their order. The first that does not fit closes the batch, so that no text waits forever.
"""

from __future__ import annotations

from dataclasses import dataclass

from lacre.errors import UsageError
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue


@dataclass(frozen=True, slots=True)
class Room:
    """The limits of one batch: tokens of all its texts, and number of texts."""

    tokens: int
    texts: int


@dataclass(frozen=True, slots=True)
class _Text:
    id: str
    n_tokens: int
    fair: Fair


class Packing:
    """The waiting texts. A text is known from `add` until `take` or `drop`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._turns: FairQueue[_Text] = FairQueue()
        self._known: dict[str, _Text] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, text_id: str, n_tokens: int, fair: Fair = NOBODY) -> None:
        if text_id in self._known or not 0 < n_tokens <= self.room.tokens:
            raise UsageError("The text's id is in use, or it does not fit into any batch.")
        text = self._known[text_id] = _Text(text_id, n_tokens, fair)
        self._turns.add(fair, text_id, text)

    def drop(self, text_id: str) -> bool:
        """False if it does not wait, or no longer."""
        text = self._known.pop(text_id, None)
        if text is not None:
            self._turns.drop(text.fair, text_id)
        return text is not None

    def take(self) -> list[str]:
        """The next batch; not empty while texts wait."""
        batch: list[str] = []
        left = self.room.tokens
        while len(batch) < self.room.texts:
            text = self._turns.next()
            if text is None or text.n_tokens > left:
                break
            left -= text.n_tokens
            self._turns.spend(text.fair, text.n_tokens)
            self._turns.take(text.fair, text.id, hold=False)
            del self._known[text.id]
            batch.append(text.id)
        return batch
