"""Speculation: guesses an answer's next tokens, so that one step of the model checks several.

Rules:
- A guess never decides anything. Each token is chosen from the model's own logits as if nothing had been guessed: greedily, or
  drawn. If it equals the guess, the same step has the logits that follow it; if not, the rest is thrown away. So the
  probability of every answer stays what it is, with any sampling.
- It guesses only as much as makes this engine faster (`gain.py`), by each task's measured share of right guesses. A task whose
  guesses are wrong gets none for a while. Many running tasks leave no room for guesses.
- Answers under a grammar have none, because their next mask is not ready. Nor have given answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.context import Compute
from lacre_backend.engine.draft_model import DraftFile, DraftModel
from lacre_backend.engine.drafting import Drafter, Wanted
from lacre_backend.engine.fillers import FILLER
from lacre_backend.engine.gain import Gain, Offer
from lacre_backend.engine.lookup import Lookup
from lacre_backend.engine.model import Model
from lacre_backend.engine.plan import EngineLimits, StepPlan
from lacre_backend.engine.sizing import EngineSizing, LlamaSettings

_PRIOR: Final = 0.6  # the share of right guesses before any was checked
_OWN: Final = 2.0  # guesses of a task that count as much as those of all tasks
_FADE: Final = 0.98  # of a task's record, for each step in which it got no guess: so it is tried again
_SURE: Final = 0.99  # no guess is surer
_MEMORY: Final = 0.9  # of a task's record, for each checked guess
_ALL: Final = 0.99  # the same, of all tasks


@dataclass(frozen=True, slots=True)
class SpeculationCounts:
    """Since the engine started. steps: that checked guesses. guessed: tokens. accepted: those that were right."""

    steps: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.guessed if self.guessed else 0.0

    def since(self, before: SpeculationCounts) -> SpeculationCounts:
        return SpeculationCounts(self.steps - before.steps, self.guessed - before.guessed, self.accepted - before.accepted)


class _Hits:
    """A share of right guesses that forgets."""

    __slots__ = ("keep", "right", "tried")

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.right = self.tried = 0.0

    def add(self, right: int, wrong: int) -> None:
        fade = self.keep ** (right + wrong)
        self.right = self.right * fade + right
        self.tried = self.tried * fade + right + wrong

    def fade(self) -> None:
        self.right *= _FADE
        self.tried *= _FADE

    def share(self, prior: float) -> float:
        return (self.right + _OWN * prior) / (self.tried + _OWN)


def speculation(settings: LlamaSettings, model: Model, shape: EngineSizing, draft: DraftFile | None) -> Speculation | None:
    """What the settings ask for. model: the served one. Raises SettingsError."""
    if settings.speculation == "off":
        return None
    if not shape.limits.cuttable:
        raise SettingsError(f'{model.info.name} cannot take back wrong guesses: its state is one. Set speculation = "off".')
    if settings.speculation == "lookup":
        return Speculation(Lookup(), shape.limits)
    if draft is None:
        raise SettingsError('speculation = "draft" needs the file of a draft model: set `draft_model`.')
    compute = Compute(shape.threads, settings.flash, settings.kv_type)
    return Speculation(DraftModel(draft, model, shape.limits, compute, settings.gpu), shape.limits)


class Speculation:
    """Of one engine. Only the decode thread uses it, except `enabled` and `counts`."""

    def __init__(self, drafter: Drafter, limits: EngineLimits) -> None:
        self.enabled = True
        self.counts = SpeculationCounts()
        self._drafter = drafter
        self._even = not limits.unified
        self.gain = Gain(limits.drafts, even=self._even)
        self._tasks: dict[str, _Hits] = {}
        self._every = _Hits(_ALL)
        self._guessed: dict[str, int] = {}  # by task: real guesses, without fillers

    def drafts(self, wanted: Sequence[Wanted]) -> dict[str, list[int]]:
        """Guesses to check in the next step. wanted: every task that generates."""
        self._guessed = {}
        if not (self.enabled and any(task.most > 0 for task in wanted)):
            return {}
        if self._even and not all(task.able for task in wanted):
            return {}  # each would need as many guesses as the others
        every = self._every.share(_PRIOR)
        hits = [self._tasks.setdefault(task.id, _Hits(_MEMORY)) for task in wanted]
        offers = [Offer(min(one.share(every), _SURE), task.most) for one, task in zip(hits, wanted, strict=True)]
        numbers = self.gain.allot(offers, self._drafter.seconds)
        if not any(numbers):
            self._fade(hits, offers)
            return {}
        asked = [task._replace(most=min(task.most, n)) for task, n in zip(wanted, numbers, strict=True)]
        found = self._drafter.draft([task for task in asked if task.most > 0])
        there = [offer._replace(most=len(found.get(task.id, ()))) for offer, task in zip(offers, wanted, strict=True)]
        return self._padded(wanted, self.gain.allot(there), found)  # there may be few, or none

    def executed(self, plan: StepPlan, seconds: float) -> None:
        """A step that read no prompt took this long."""
        self.gain.observe(plan.generating + plan.drafted, seconds)
        if plan.drafted:
            self.counts = replace(self.counts, steps=self.counts.steps + 1)

    def settle(self, task_id: str, confirmed: int, *, ended: bool) -> None:
        """The step checked the task's guesses. confirmed: how many of the first ones were right."""
        guessed = self._guessed.pop(task_id, 0)
        right = min(confirmed, guessed)
        wrong = int(right < guessed and not ended)
        known = self.counts
        self.counts = replace(known, guessed=known.guessed + guessed, accepted=known.accepted + right)
        if (hits := self._tasks.get(task_id)) is not None:
            hits.add(right, wrong)
        self._every.add(right, wrong)

    def forget(self, task_id: str) -> None:
        self._tasks.pop(task_id, None)
        self._drafter.forget(task_id)

    def wipe(self) -> None:
        self._drafter.wipe()

    def close(self) -> None:
        self._drafter.close()

    def _fade(self, hits: Sequence[_Hits], offers: Sequence[Offer]) -> None:
        for one, offer in zip(hits, offers, strict=True):
            if offer.most:
                one.fade()
        self._every.fade()

    def _padded(self, wanted: Sequence[Wanted], numbers: Sequence[int], found: dict[str, list[int]]) -> dict[str, list[int]]:
        drafts: dict[str, list[int]] = {}
        for task, n in zip(wanted, numbers, strict=True):
            guesses = found.get(task.id, [])[:n]
            self._guessed[task.id] = len(guesses)
            if n:
                drafts[task.id] = guesses + [FILLER] * (n - len(guesses))
        return drafts
