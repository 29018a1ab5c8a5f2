"""Which waiting texts go into the next batch of an encoder: a queue for each scope, served in turn.

Rules
- Pure: no I/O, no clock, no thread, no llama.cpp.
- Scopes take turns, a text each, so that one scope's thousand texts do not hold up another's one.
- Within a scope the order is that of arrival; the first that does not fit closes the batch, so that none waits for ever.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from lacre.errors import UsageError


@dataclass(frozen=True, slots=True)
class Room:
    """Of one batch: tokens of all its texts, and texts."""

    tokens: int
    texts: int


class Packing:
    """What waits. A text is known from `add` until `take` or `drop`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._waiting: OrderedDict[bytes | None, deque[str]] = OrderedDict()
        self._known: dict[str, tuple[int, bytes | None]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, text_id: str, n_tokens: int, scope: bytes | None) -> None:
        if text_id in self._known or not 0 < n_tokens <= self.room.tokens:
            raise UsageError("The text is known already, or does not fit into any batch.")
        self._known[text_id] = n_tokens, scope
        self._waiting.setdefault(scope, deque()).append(text_id)

    def drop(self, text_id: str) -> bool:
        """False where it does not wait (any more)."""
        known = self._known.pop(text_id, None)
        if known is None:
            return False
        queue = self._waiting[known[1]]
        queue.remove(text_id)
        if not queue:
            del self._waiting[known[1]]
        return True

    def take(self) -> list[str]:
        """The next batch: not empty while something waits."""
        batch: list[str] = []
        left = self.room.tokens
        while self._waiting and len(batch) < self.room.texts:
            scope, queue = next(iter(self._waiting.items()))
            n_tokens = self._known[queue[0]][0]
            if n_tokens > left:
                break
            left -= n_tokens
            batch.append(queue.popleft())
            del self._known[batch[-1]]
            del self._waiting[scope]
            if queue:
                self._waiting[scope] = queue  # its next turn is after the others'
        return batch
