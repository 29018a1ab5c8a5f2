"""The results of checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it serves, but the operator should know
    FAILED = "failed"  # it does not serve, or not all callers
    SKIPPED = "skipped"  # could not be checked


@dataclass(frozen=True, slots=True)
class Finding:
    """remedy: what to do; empty if there is nothing to do."""

    check: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(slots=True)
class Findings:
    """Collects results in order."""

    found: list[Finding] = field(default_factory=list)

    def ok(self, check: str, detail: str) -> None:
        self.found.append(Finding(check, State.OK, detail))

    def warn(self, check: str, detail: str, remedy: str) -> None:
        self.found.append(Finding(check, State.WARNING, detail, remedy))

    def failed(self, check: str, detail: str, remedy: str) -> None:
        self.found.append(Finding(check, State.FAILED, detail, remedy))

    def skipped(self, check: str, why: str) -> None:
        self.found.append(Finding(check, State.SKIPPED, why))
