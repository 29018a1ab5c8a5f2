"""Usage by tenant, day, model or user, added up from audit logs: for invoices and for the operator's own numbers.

Rules:
- Each served request counts once: its outcome's tokens and money, at the day of its intent, in UTC.
- A request without a receipt counts as the budgets count it: with its money, but with no tokens.
- A request whose intent is in no given log cannot be placed. It is counted apart, so that nobody takes the sums for whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from lacre.errors import UsageError

_REFUSED: Final = "refused"


def _at(form: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda intent: datetime.fromtimestamp(intent["time"], UTC).strftime(form)


def _named(member: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda intent: str(intent[member] or "")


# What requests can be grouped by.
GROUPS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "tenant": _named("tenant"), "user": _named("subject"), "issuer": _named("issuer"), "model": _named("model"),
    "pool": _named("pool"), "plan": _named("plan"), "day": _at("%Y-%m-%d"), "month": _at("%Y-%m"),
}  # fmt: skip
COUNTS: Final = ("requests", "refused", "prompt_tokens", "cached_tokens", "completion_tokens", "money")


@dataclass(slots=True)
class BillLine:
    """prompt_tokens includes cached_tokens. money: micro-units. refused: requests that were not served, which cost nothing."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    money: int = 0


@dataclass(slots=True)
class Bill:
    """lines: by the values of the groups. unplaced: outcomes without an intent. open: intents without an outcome."""

    by: tuple[str, ...]
    lines: dict[tuple[str, ...], BillLine] = field(default_factory=dict)
    unplaced: int = 0
    open: int = 0


def groups_of(text: str) -> tuple[str, ...]:
    """`tenant,day` as the names of groups. Raises UsageError."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in GROUPS or names.count(name) > 1:
            raise UsageError(f"--by {text!r}: name each of these at most once, with commas between: {', '.join(GROUPS)}")
    return names


def bill(entries: Iterable[Mapping[str, Any]], by: Sequence[str], since: float | None, until: float | None) -> Bill:
    """entries: of each log in order. since, until: of intents, in seconds since the epoch."""
    made = Bill(tuple(by))
    # None: before or after the wanted time.
    running: dict[str, tuple[str, ...] | None] = {}
    for entry in entries:
        if entry["kind"] == "intent":
            wanted = (since is None or entry["time"] >= since) and (until is None or entry["time"] < until)
            running[entry["request_id"]] = tuple(GROUPS[name](entry) for name in by) if wanted else None
        elif entry["kind"] == "outcome":
            if entry["request_id"] not in running:
                made.unplaced += 1
            elif (place := running.pop(entry["request_id"])) is not None:
                _add(made.lines.setdefault(place, BillLine()), entry)
    made.open = sum(place is not None for place in running.values())
    made.lines = dict(sorted(made.lines.items()))
    return made


def _add(line: BillLine, outcome: Mapping[str, Any]) -> None:
    if outcome["outcome"] == _REFUSED:
        line.refused += 1
        return
    line.requests += 1
    line.prompt_tokens += outcome["prompt_tokens"] or 0
    line.cached_tokens += outcome["cached_tokens"] or 0
    line.completion_tokens += outcome["completion_tokens"] or 0
    line.money += outcome.get("money") or 0
