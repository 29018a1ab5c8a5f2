"""Runs the scheduler beside a model of the memory that it rules, and checks each of its plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lacre_backend.engine.plan import Copy, Discard, EngineLimits, Restore, Save, StepPlan, Trim
from lacre_backend.engine.scheduler import NO_DRAFTS, Scheduler
from lacre_backend.engine.turns import NOBODY, Fair

SPLIT = EngineLimits(slots=5, context=128, cells=640, step=64, chunk=32, burst=16, share=8, multiple=4, drafts=20)
TIGHT = dataclasses.replace(SPLIT, cells=160, unified=True)
WHOLE = dataclasses.replace(SPLIT, cuttable=False)
TWO = EngineLimits(slots=2, context=512, cells=1024)
FOUR = EngineLimits(slots=4, context=1024, cells=4096)
SAVING = EngineLimits(
    slots=3, context=512, cells=1536, step=256, chunk=200, burst=96, share=64, multiple=4, drafts=20, saved=1500
)


class Memory:
    """What llama.cpp's cache would hold: for each slot its cells, each with a token and the owner for whom it was computed.

    Cells are objects: those that slots of a unified cache share are the same object.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.slots: list[list[list[object]]] = [[] for _ in range(limits.slots)]
        self.copies: dict[int, list[list[object]]] = {}  # of idle caches
        self.broken = False  # whether nothing is restored

    def execute(self, plan: StepPlan, owners: dict[str, object]) -> list[Restore]:
        """owners: of each task: whose cells it may attend to. Returns what was not restored."""
        lost = []
        for step in plan.memory:
            match step:
                case Trim():
                    assert len(self.slots[step.slot]) > step.keep, "there was something to remove"
                    assert self.limits.cuttable or step.keep == 0, "one state can only be dropped whole"
                    del self.slots[step.slot][step.keep :]
                case Copy():
                    self.copy(step)
                case Save():
                    assert step.number not in self.copies
                    self.copies[step.number] = [list(cell) for cell in self.slots[step.slot]]
                    assert len(self.copies[step.number]) == step.length
                    assert all(cell[1] == (step.scope, step.adapter) for cell in self.slots[step.slot])
                case Restore():
                    lost += [] if self.restored(step) else [step]
                case Discard():
                    del self.copies[step.number]
        assert sum(map(len, self.copies.values())) <= self.limits.saved
        assert plan.size <= self.limits.step
        assert [s.slot for s in plan.segments] == sorted({s.slot for s in plan.segments}), "once each, ascending"
        for segment in plan.segments:
            cells, owner = self.slots[segment.slot], None if segment.task is None else owners[segment.task]
            assert len(cells) == segment.start, "positions go on where they were"
            assert segment.tokens
            assert segment.task is None or all(cell[1] == owner for cell in cells), (
                "attended to by its owner or a sibling alone"
            )
            cells += [[token, owner] for token in segment.tokens]
            assert len(cells) <= self.limits.context
        assert self.used <= self.limits.cells
        assert self.limits.cuttable or not plan.after
        for trim in plan.after:
            del self.slots[trim.slot][trim.keep :]
        assert not {step.slot for step in lost} & {segment.slot for segment in plan.segments}, "none depends on it"
        return lost

    def restored(self, step: Restore) -> bool:
        assert not self.slots[step.slot]
        assert 0 < step.keep <= step.length == len(self.copies[step.number])
        assert all(cell[1] == (step.scope, step.adapter) for cell in self.copies[step.number])
        if not self.broken:
            self.slots[step.slot] = [list(cell) for cell in self.copies[step.number][: step.keep]]
        return not self.broken

    def copy(self, step: Copy) -> None:
        assert not self.slots[step.target]
        assert len(self.slots[step.source]) >= step.keep
        assert self.limits.cuttable or len(self.slots[step.source]) == step.keep, "one state can only be copied as it is"
        source = self.slots[step.source][: step.keep]
        self.slots[step.target] = source if self.limits.unified else [list(cell) for cell in source]

    @property
    def used(self) -> int:
        return len({id(cell) for cells in self.slots for cell in cells})


class Driver:
    """Runs a scheduler beside the model of its memory; every task generates `output` tokens."""

    def __init__(self, limits: EngineLimits = SPLIT) -> None:
        self.scheduler = Scheduler(limits)
        self.memory = Memory(limits)
        self.plans: list[StepPlan] = []
        self.left: dict[str, int] = {}  # tokens that each task has yet to generate
        self.wanted: dict[str, list[int]] = {}  # of tasks that did not end: the prompt and what was generated
        self.owners: dict[str, object] = {}  # its scope, or its request where it has none; and its adapter
        self.adapters: dict[str, str | None] = {}
        self.found: dict[str, int] = {}  # tokens that were cached for each task

    def submit(self, name: str, prompt: list[int], scope: bytes | None = None, output: int = 4, fair: Fair = NOBODY,
               begun: Sequence[int] = (), group: str | None = None, adapter: str | None = None) -> None:  # fmt: skip
        self.scheduler.submit(name, prompt, scope, begun, fair, group=group, adapter=adapter)
        self.adapters[name] = adapter
        self.wanted[name] = [*prompt, *begun]
        self.owners[name] = (scope or group or name, adapter)
        self.left[name] = min(output, self.scheduler.limits.context - len(self.wanted[name]))

    def submit_many(
        self, prompts: Iterable[list[int]], scope: bytes | None = None, output: int = 4, fair: Fair = NOBODY
    ) -> None:
        """Tasks t0, t1 and so on."""
        for i, prompt in enumerate(prompts):
            self.submit(f"t{i}", prompt, scope, output, fair)

    def submit_choices(self, n: int, prompt: list[int], fair: Fair = NOBODY) -> None:
        """n0, n1 and so on, of one request without a scope."""
        for i in range(n):
            self.submit(f"n{i}", prompt, fair=fair, group="g")

    def step(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> StepPlan:
        """drafts: guesses; those that are all 7 are right."""
        plan = self.scheduler.plan(drafts)
        for lost in self.memory.execute(plan, self.owners):
            self.scheduler.lost(lost)
        assert self.scheduler.free_cells == self.memory.limits.cells - self.memory.used, (
            "the counts are those of the real cells"
        )
        self.plans.append(plan)
        self.found |= {name: self.scheduler.cached(name) for name in plan.admitted}
        for name in plan.copied:
            slot = self.scheduler._tasks[name].slot
            assert slot is not None
            assert self.held(slot.index) == self.wanted[name], "the whole prompt is there"
            assert name not in [segment.task for segment in plan.segments]
            self.result(name)
        for segment in plan.segments:
            if segment.task is not None:
                assert self.adapters[segment.task] == plan.adapter, "a step has one adapter's tasks"
                held, wanted = self.held(segment.slot), self.wanted[segment.task]
                known = len(held) - segment.drafted
                assert held[:known] == wanted[:known], "the slot holds a beginning of its task's tokens"
                assert held[known:] == list(drafts.get(segment.task, ())[: segment.drafted]), "and then its guesses"
                assert segment.output == (known == len(wanted))
                if segment.output:
                    self.results(segment.task, held[known:])
        assert plan.drafted <= self.memory.limits.drafts
        assert not plan.drafted or plan.generating == sum(segment.task is not None for segment in plan.segments), "none reads"
        return plan

    def results(self, name: str, guesses: Sequence[object]) -> None:
        """The segment's token, and those that follow right guesses."""
        for guess in [*guesses, None]:
            confirmed = self.result(name)
            assert confirmed == (guess == 7 and name in self.wanted), (
                "a right guess gives one more token, if any is left to make"
            )
            if not confirmed:
                break

    def held(self, slot: int) -> list[object]:
        return [cell[0] for cell in self.memory.slots[slot]]

    def result(self, name: str) -> bool:
        """One more token of the answer. Returns whether it had been guessed."""
        self.left[name] -= 1
        if self.left[name] <= 0:
            self.end(name)
            return False
        self.wanted[name].append(7)
        return self.scheduler.advance(name, 7)

    def end(self, name: str, *, keep: bool = True) -> None:
        self.scheduler.end(name, keep=keep)
        del self.wanted[name]

    def run(self, until: str | None = None) -> None:
        """To the end of a task, or of all."""
        while until in self.wanted if until else self.scheduler.busy:
            plan = self.step()
            worked = plan.copied or any(segment.task for segment in plan.segments)
            assert worked or any(isinstance(step, Restore) for step in plan.memory), "no step goes by without work"
        assert until or not self.wanted, "every task ended, once"

    @property
    def admitted(self) -> list[str]:
        return [name for plan in self.plans for name in plan.admitted]

    def computed(self, length: int, *names: str) -> int:
        """How many tokens of prompts of this length were computed, of these tasks or of all."""
        segments = [segment for plan in self.plans for segment in plan.segments if segment.task is not None]
        return sum(len(s.tokens) for s in segments if s.start < length and (not names or s.task in names))
