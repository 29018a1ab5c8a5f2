"""What a request wishes of the model's reasoning, in the variables that its chat template reads.

Rules:
- A wish has no effect on a template that has no variable for it. A variable that no template is known to take for a wish is
  refused by name if this template does not read it.
- Templates differ in their words. `effort` is the nearest that the template takes.
- A caller's own variables come last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_USUAL: Final = frozenset({"low", "medium", "high"})  # taken by every template that has a variable for it, unless it refuses
_EFFORT: Final = ("reasoning_effort", "thinking_effort")
SWITCHES: Final = ("enable_thinking", "thinking", "reasoning")
_BUDGET: Final = "thinking_budget"  # Seed-OSS tells the model
# Wishes that clients send to every model.
KNOWN: Final = frozenset({*_EFFORT, *SWITCHES, _BUDGET, "thinking_mode", "clear_thinking", "preserve_thinking"})


@dataclass(frozen=True, slots=True)
class Wishes:
    """effort: one of `EFFORTS`. budget: tokens of reasoning. variables: the caller's own."""

    effort: str | None = None
    budget: int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def values(self, taken: frozenset[str], efforts: Mapping[str, str]) -> dict[str, Any]:
        """The template's variables. taken: those that it reads. efforts: its word for each effort."""
        values: dict[str, Any] = {}
        if self.effort is not None:
            values |= {name: self.effort != "none" for name in SWITCHES if self.effort != "minimal"}
            values |= {name: efforts[self.effort] for name in _EFFORT if self.effort in efforts}
        if self.budget is not None:
            values[_BUDGET] = self.budget
        values |= self.variables
        return {name: value for name, value in values.items() if name in taken}

    def unknown(self, taken: frozenset[str]) -> Sequence[str]:
        """The caller's variables that change nothing here, and are no known wish."""
        return [name for name in self.variables if name not in taken and name not in KNOWN]


NO_WISHES: Final = Wishes()


def efforts_of(source: str, takes: Callable[[Mapping[str, Any]], bool]) -> dict[str, str]:
    """A template's word for each effort: its own if it has one, or else the nearest. takes: whether it renders with these."""
    words = [word for word in EFFORTS if word in _USUAL or f"'{word}'" in source or f'"{word}"' in source]
    known = [word for word in words if takes(dict.fromkeys(_EFFORT, word))]

    def nearest(effort: str) -> str:
        return min(known, key=lambda word: (abs(EFFORTS.index(word) - EFFORTS.index(effort)), -EFFORTS.index(word)))

    asked = [effort for effort in EFFORTS if effort != "none" or "none" in known]
    thinking = [word for word in known if word != "none"]
    return {effort: nearest(effort) for effort in asked} if thinking else {}
