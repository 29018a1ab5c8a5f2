"""How pages write numbers, times and names. Jinja2 escapes what these return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

MICRO: Final = 1_000_000
_NONE: Final = "–"


def count(value: float | None) -> str:
    """1234567 as 1 234 567, with narrow spaces."""
    if value is None:
        return _NONE
    whole = round(value)
    return f"{whole:,}".replace(",", "\u202f")


def when(seconds: float | None) -> str:
    return _NONE if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def machine(seconds: float) -> str:
    """For `<time datetime>`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def span(seconds: float | None) -> str:
    """A length of time, in its two largest units."""
    if seconds is None:
        return _NONE
    left, sign = abs(seconds), "-" if seconds < 0 else ""
    if left < 1:
        return f"{sign}{left * 1000:.0f} ms"
    if left < 60:
        return f"{sign}{left:.3g} s"
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        whole, left = divmod(int(left), size)
        if whole:
            parts.append(f"{whole} {unit}")
    return sign + " ".join(parts[:2])


def share(part: float, of: float | None) -> str:
    return _NONE if not of else f"{100 * part / of:.0f} %"


def amount(value: int | None, kind: str, currency: str) -> str:
    """Of a limit; money is in micro-units."""
    if value is None:
        return _NONE
    return f"{value / MICRO:,.2f} {currency}".replace(",", "\u202f") if kind == "money_per_month" else count(value)


def readable(name: str) -> str:
    """`tokens_per_day` as people write it."""
    return name.replace("_", " ").replace("-", " ")


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "count": count, "when": when, "machine": machine, "span": span, "share": share, "amount": amount, "readable": readable,
}  # fmt: skip
