"""Keywords of numbers: bounds and steps (JSON Schema Validation, draft 2020-12, section 6.2).

Rules:
- A bound beyond the integers that JSON readers keep exactly is no constraint: this server writes no such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Final

from lacre_backend.api.schema.terms import MAX_EXACT, Case, Place, SchemaRefused, Unknown

MAX_STEP: Final = 10_000  # of `multipleOf`: an automaton stores each remainder
MIN_STEP: Final = 0.0001
MAX_STEP_DIGITS: Final = 4


def bound(keyword: str, place: Place) -> float:
    value = place.schema[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemaRefused(keyword, place.path, "is not a number")
    return exact(keyword, value, place)


def exact(keyword: str, value: float, place: Place) -> float:
    if not abs(value) <= MAX_EXACT:
        raise SchemaRefused(
            keyword, place.path, f"names a number beyond {MAX_EXACT}, which not every JSON reader keeps exactly"
        )
    return value


def _written(keyword: str, place: Place) -> float:
    """A bound, clamped to the exact range."""
    value = place.schema[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemaRefused(keyword, place.path, "is not a number")
    upper = keyword in ("maximum", "exclusiveMaximum")
    if keyword != "multipleOf" and (value > MAX_EXACT if upper else value < -MAX_EXACT):
        return math.copysign(MAX_EXACT, value)
    return exact(keyword, value, place)


def number(unknown: Unknown, keyword: str, place: Place, case: Case) -> Case:
    value = _written(keyword, place)
    match keyword:
        case "minimum" | "exclusiveMinimum":
            return above(case, value, excluded=keyword == "exclusiveMinimum")
        case "maximum" | "exclusiveMaximum":
            return below(case, value, excluded=keyword == "exclusiveMaximum")
    if value <= 0:
        raise SchemaRefused(keyword, place.path, "is not more than 0")
    if not _fine_step(value):
        unknown(keyword, place, f"has more than {MAX_STEP_DIGITS} digits, or is not from {MIN_STEP} to {MAX_STEP}")
        return case
    common = common_multiple((*case.multiples, value))
    if not _fine_step(common):
        told = f"has a least common multiple of {common:.15g} with the others at its place"
        unknown(keyword, place, f"{told}, which has more than {MAX_STEP_DIGITS} digits, or is more than {MAX_STEP}")
        return case
    return replace(case, multiples=(common,))


def _fine_step(value: float) -> bool:
    return len(f"{value:.15g}".replace(".", "").strip("0")) <= MAX_STEP_DIGITS and MIN_STEP <= value <= MAX_STEP


def common_multiple(steps: Sequence[float]) -> float:
    """The least common multiple: a multiple of it is a multiple of every step. Separate steps would multiply each other's
    remainders in an automaton. llguidance searches all of them despite its limits.
    """
    exact = [Fraction(f"{step:.15g}") for step in steps]
    return float(Fraction(math.lcm(*(each.numerator for each in exact)), math.gcd(*(each.denominator for each in exact))))


def remainders(step: float) -> int:
    """How many remainders an automaton stores for a `multipleOf`: its digits as a whole number."""
    return int(f"{step:.4f}".rstrip("0").replace(".", ""))


def above(case: Case, value: float, *, excluded: bool) -> Case:
    return replace(case, low=max(case.low, (value, excluded)))


def below(case: Case, value: float, *, excluded: bool) -> Case:
    tighter = value < case.high[0] or (value == case.high[0] and excluded)
    return replace(case, high=(value, excluded)) if tighter else case


def empty_range(case: Case) -> bool:
    """Whether no number lies within the case's bounds."""
    (low, without_low), (high, without_high) = case.low, case.high
    if low > high or (low == high and (without_low or without_high)):
        return True
    if case.whole is not True or math.inf in (-low, high):
        return case.whole is False and low == high and low == low // 1
    first = low // 1 + 1 if without_low or low != low // 1 else low
    last = high // 1 - 1 if without_high and high == high // 1 else high // 1
    return first > last
