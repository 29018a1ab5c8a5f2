"""The facts of a process's newest exchanges by the gateway's id of the request, for objects that keep only this id.

Rules:
- Nothing of a request's or an answer's content is kept, token ids included.
- Nobody signed the id. If a gateway gives one id to two exchanges, neither can be found.
- The oldest go first. A forked child begins with none.

This is state of the process, because an object of `openai` does not know which client made it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Final

from lacre.evidence.exchange_info import Facts
from lacre.runtime import forks

MOST: Final = 1024  # exchanges of some kilobytes each: more than run at once, so that a program finds its last answer


class RecentExchanges:
    """Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._by_id: OrderedDict[str, Facts | None] = OrderedDict()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._by_id = OrderedDict()

    def keep(self, facts: Facts) -> None:
        """Keeps a copy, if the gateway named the request."""
        if facts.request_id is None:
            return
        kept = replace(facts, tokens=[])
        with self._lock:
            self._by_id[facts.request_id] = None if facts.request_id in self._by_id else kept
            while len(self._by_id) > self._most:
                self._by_id.popitem(last=False)

    def find(self, request_id: str) -> Facts | None:
        """None if it is unknown, forgotten or ambiguous."""
        with self._lock:
            return self._by_id.get(request_id)


RECENT: Final = RecentExchanges(MOST)
