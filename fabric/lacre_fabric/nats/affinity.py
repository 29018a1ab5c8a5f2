"""Which worker has the beginning of a conversation in its cache: the same one as before, as far as anybody knows.

Rules:
- The choice is a function of the affinity and of the live workers (rendezvous hashing). So nothing is remembered, shared or
  written, and all gateways agree. If a worker comes or goes, only the conversations that it gets or had move.
- The gateway offers the work to that worker. Only if the worker declines it, or is certainly not there, does the work go
  elsewhere: it never runs twice.
- A busy worker is not asked, and no other one in its place: the pool's queue decides then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

TRIES: Final = 2  # workers: the first may have died since its last presence
# Unanswered offers of one gateway process to one worker. NATS ends a connection for which 64 MiB wait, and work has 9 at most.
MAX_UNANSWERED: Final = 4


def in_turn(affinity: bytes, free: Mapping[str, int], unanswered: Mapping[str, int] | None = None) -> list[str]:
    """The workers to ask, best first; it ends before the first busy one. free: the free slots of each worker. unanswered: how
    many offers each has to answer.
    """
    asked_now = unanswered or {}

    def rank(node: str) -> bytes:
        return hashlib.sha256(affinity + node.encode()).digest()

    asked: list[str] = []
    for node in sorted(free, key=rank)[:TRIES]:
        if asked_now.get(node, 0) >= min(free[node], MAX_UNANSWERED):
            break
        asked.append(node)
    return asked
