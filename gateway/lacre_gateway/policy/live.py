"""The active rule set, and how a new one replaces it while requests are served.

Rules:
- A new set is tried in another process, then read here; it must be exactly the set that passed.
- It takes over between two decisions, in one assignment. A set that does not hold changes nothing: the last good set stays, and
  the log, the audit log and the status say so.
- Changed files are read once they no longer change. A refused set is tried again when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre_fabric.logs import Log
from lacre_gateway.audit.entries import RELOAD_REFUSED, RELOADED, Entry, Event
from lacre_gateway.policy.cedar import Decision, PolicyError
from lacre_gateway.policy.question import AnyQuestion
from lacre_gateway.policy.rules import RuleSet, Signature, signature
from lacre_gateway.policy.trial import UNTRIED, try_out

WATCH: Final = 1.0  # seconds between two checks of the files

_NOTHING: Final[Signature] = (("", 0, 0, 0),)  # differs from every real signature

Record = Callable[[Entry], object]


@dataclass(frozen=True, slots=True)
class Refused:
    """A set on the disk that was refused. fault: in a word. place: its file, if known. time: epoch seconds."""

    fault: str
    place: str
    time: float


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the rules. policy_set, rules: hex SHA-256 of the active policies, and of all files of the set.

    since: when it took over. reloads, refusals: how many since the start. refused: the newest set, if it does not hold.
    """

    policy_set: str
    rules: str
    policies: int
    cases: int
    since: float
    reloads: int
    refusals: int
    refused: Refused | None

    def detail(self) -> dict[str, Any]:
        """For `readyz`: fixed words and names of files."""
        refused = self.refused
        return {
            "policy_set": self.policy_set,
            "since": self.since,
            "refused": None if refused is None else {"fault": refused.fault, "file": refused.place, "since": refused.time},
        }


class LiveRules:
    """Made and used on the event loop. current: the active set."""

    def __init__(self, folder: Path, *, log: Log, clock: Callable[[], float]) -> None:
        """Raises PolicyError: a gateway does not start without a first set."""
        self._folder = folder
        self._log = log
        self._clock = clock
        self._reloading = asyncio.Lock()
        self._refused: Refused | None = None
        self._reloads = self._refusals = 0
        self._since = round(clock(), 3)
        self.current = RuleSet.load(folder)
        self._tried: Signature | None = self.current.signature

    def decide(self, question: AnyQuestion) -> Decision:
        return self.current.policies.decide(question)

    def read(self, member: str) -> bool:
        """Whether a decision may depend on this member of the context."""
        return self.current.policies.read(member)

    def would_allow(self, question: AnyQuestion) -> bool:
        """For questions that no caller has asked: see `policy.denial`."""
        return self.current.policies.would_allow(question)

    @property
    def status(self) -> Status:
        rules = self.current
        return Status(
            policy_set=rules.policies.digest,
            rules=rules.digest,
            policies=len(rules.policies.names),
            cases=len(rules.cases),
            since=self._since,
            reloads=self._reloads,
            refusals=self._refusals,
            refused=self._refused,
        )

    async def reload(self, record: Record, actor: str | None = None) -> Status:
        """Activates the rules that are on the disk. record: writes the event into the audit log. actor: who asked, or None.

        Raises PolicyError, and then everything stays as before.
        """
        async with self._reloading:
            self._tried = await asyncio.to_thread(self._look)
            try:
                passed = await try_out(self._folder)
                fresh = await asyncio.to_thread(RuleSet.read, self._folder)
                if fresh.digest != passed:
                    raise PolicyError(UNTRIED, "", "the files changed while they were read")
            except PolicyError as exc:
                if exc.fault == UNTRIED:
                    self._tried = _NOTHING
                self._refuse(exc, record, actor)
                raise
            self._take(fresh, record, actor)
        return self.status

    async def watch(self, record: Record, interval: float = WATCH) -> None:
        """Reloads whenever the files have changed and then come to rest; runs forever."""
        seen = self._tried
        while True:
            await asyncio.sleep(interval)
            now = await asyncio.to_thread(self._look)
            if now == seen and now != self._tried:
                with contextlib.suppress(PolicyError):  # `reload` reports it
                    await self.reload(record)
            seen = now

    def _look(self) -> Signature | None:
        """None if the files cannot be read."""
        try:
            return signature(self._folder)
        except PolicyError:
            return None

    def _take(self, fresh: RuleSet, record: Record, actor: str | None) -> None:
        if fresh.digest == self.current.digest and self._refused is None and actor is None:
            return  # files that were touched but have the same content
        self.current, self._refused = fresh, None
        self._since, self._reloads = round(self._clock(), 3), self._reloads + 1
        record(Event(time=self._since, event=RELOADED, actor=actor, policy_set=fresh.policies.digest, rules=fresh.digest))
        self._log.info("rules reloaded", version=fresh.digest)

    def _refuse(self, error: PolicyError, record: Record, actor: str | None) -> None:
        now = round(self._clock(), 3)
        self._refused, self._refusals = Refused(error.fault, error.place, now), self._refusals + 1
        kept = self.current
        record(
            Event(
                time=now, event=RELOAD_REFUSED, actor=actor, target=error.place or None, reason=error.fault,
                policy_set=kept.policies.digest, rules=kept.digest,
            )
        )  # fmt: skip
        self._log.error("rules refused, the last good ones stay", kind=error.fault, reason=str(error))
