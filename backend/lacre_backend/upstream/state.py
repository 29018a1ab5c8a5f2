"""The state of one server of the upstream: its last checks, and counts of its requests.

Rules:
- The app's thread counts. The checks (`probe`), in the node's thread, write `wrong`. Either may set a server aside or end that:
  the later of them knows more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ASIDE: Final = 5.0  # seconds that an unreachable server gets no requests, unless a check reaches it earlier
UNKNOWN: Final = "was not checked yet"


@dataclass(slots=True)
class OriginState:
    """One server.

    - wrong: why it is down, from its checks. failures: failed checks in a row.
    - running: requests there now. tried: all requests that were to go there. unreachable: those of them that were not sent,
      because there was no connection. failed: those that it did not answer as it should.
    - aside: until when it gets no requests, on the monotonic clock. chosen: the number of the last choice that fell on it.
    """

    url: str
    wrong: str | None = UNKNOWN
    failures: int = 0
    running: int = 0
    tried: int = 0
    unreachable: int = 0
    failed: int = 0
    aside: float = 0.0
    chosen: int = 0

    def usable(self, now: float) -> bool:
        """Whether a request may succeed there. A server that was not checked yet may."""
        return self.wrong in (None, UNKNOWN) and now >= self.aside

    def fault(self, now: float) -> str | None:
        """Why it gets no requests now."""
        if self.wrong is None and now < self.aside:
            return "refused a request's connection"
        return self.wrong

    def line(self, now: float) -> str:
        """For the health file."""
        state = "up" if self.fault(now) is None else "down"
        counts = f"sent={self.tried - self.unreachable} unreachable={self.unreachable} failed={self.failed}"
        return f"upstream {self.url} {state} running={self.running} {counts}"

    def put_aside(self, now: float) -> None:
        """After a request found no connection."""
        self.unreachable += 1
        self.aside = now + ASIDE

    def reached(self) -> str | None:
        """After a good check. Returns what was wrong before."""
        before, self.wrong, self.failures, self.aside = self.wrong, None, 0, 0.0
        return before

    def missed(self, wrong: str, allowed: int) -> bool:
        """After a failed check. allowed: failures in a row that mean that it is down. Returns whether it went down now."""
        self.failures += 1
        was_up = self.wrong is None
        if not was_up or self.failures >= allowed:
            self.wrong = wrong
        return was_up and self.wrong is not None
