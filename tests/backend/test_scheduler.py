"""The scheduler as a state machine, beside a model of the memory that it rules, and the promises it makes one by one."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from lacre.errors import UsageError
from lacre_backend.engine.plan import Copy, EngineLimits, StepPlan, Trim
from lacre_backend.engine.scheduler import MIN_REUSE, PIECE, Scheduler
from lacre_backend.engine.tokens import BLOCK, Tokens
from lacre_backend.engine.turns import NOBODY, Fair

PREFIX = list(range(100, 100 + 3 * MIN_REUSE))
SPLIT = EngineLimits(slots=5, context=128, cells=640, step=64, chunk=32, burst=16, share=8, multiple=4)
TIGHT = dataclasses.replace(SPLIT, cells=160, unified=True)
WHOLE = dataclasses.replace(SPLIT, cuttable=False)


class Memory:
    """What llama.cpp's cache would hold: for each slot its cells, each with a token and the scope that computed it.

    Cells are objects: those that slots of a unified cache share are the same object.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.slots: list[list[list[object]]] = [[] for _ in range(limits.slots)]

    def execute(self, plan: StepPlan, scopes: dict[str, tuple[object, ...]]) -> None:
        """scopes: of each task: what its cells belong to, which is what it may attend to."""
        for step in plan.memory:
            if isinstance(step, Trim):
                assert len(self.slots[step.slot]) > step.keep, "there was something to remove"
                assert self.limits.cuttable or step.keep == 0, "one state can only be dropped whole"
                del self.slots[step.slot][step.keep :]
            else:
                self.copy(step)
        assert plan.size <= self.limits.step
        assert [s.slot for s in plan.segments] == sorted({s.slot for s in plan.segments}), "once each, ascending"
        for segment in plan.segments:
            cells = self.slots[segment.slot]
            assert len(cells) == segment.start, "positions go on where they were"
            assert segment.tokens
            owner = () if segment.task is None else scopes[segment.task]
            if segment.task is not None:
                assert all(cell[1] in owner for cell in cells), (
                    "what is attended to came from this very scope, or from a sibling"
                )
            cells += [[token, owner[0] if owner else None] for token in segment.tokens]
            assert len(cells) <= self.limits.context
        assert self.used <= self.limits.cells
        assert self.limits.cuttable or not plan.after
        for trim in plan.after:
            del self.slots[trim.slot][trim.keep :]

    def copy(self, step: Copy) -> None:
        assert not self.slots[step.target]
        assert len(self.slots[step.source]) >= step.keep
        assert self.limits.cuttable or len(self.slots[step.source]) == step.keep, "one state can only be copied as it is"
        source = self.slots[step.source][: step.keep]
        self.slots[step.target] = source if self.limits.unified else [list(cell) for cell in source]

    @property
    def used(self) -> int:
        return len({id(cell) for cells in self.slots for cell in cells})


class Machine(RuleBasedStateMachine):
    limits = SPLIT
    tasks = Bundle("tasks")

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.memory = Memory(self.limits)
        self.wanted: dict[str, list[int]] = {}  # of tasks that did not end: the prompt and what was generated
        self.scopes: dict[str, tuple[object, ...]] = {}
        self.owners: dict[bytes | None, object] = {}
        self.steps_left: dict[str, int] = {}
        self.count = 0

    @rule(
        target=tasks,
        scope=st.sampled_from([None, b"a", b"a", b"b"]),
        common=st.integers(0, len(PREFIX)),
        own=st.lists(st.integers(0, 3), min_size=1, max_size=60),
        begun=st.lists(st.integers(0, 3), max_size=8),
        output=st.integers(1, 12),
        fair=st.sampled_from([("t", "a"), ("t", "b"), ("u", "c")]),
    )
    def submit(self, scope: bytes | None, common: int, own: list[int], begun: list[int], output: int, fair: Fair) -> str:
        self.count += 1
        name = f"t{self.count}"
        self.scheduler.submit(name, PREFIX[:common] + own, scope, begun, fair)
        self.know(name, PREFIX[:common] + own + begun, scope, output)
        return name

    @rule(
        target=tasks,
        scope=st.sampled_from([None, None, b"a", b"b"]),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=60),
        outputs=st.lists(st.integers(1, 12), min_size=2, max_size=8),
        fair=st.sampled_from([("t", "a"), ("t", "b"), ("u", "c")]),
        reuse=st.booleans(),
    )
    def submit_choices(
        self, scope: bytes | None, prompt: list[int], outputs: list[int], fair: Fair, reuse: bool
    ) -> MultipleResults[str]:
        prompt = PREFIX[: 40 * reuse] + prompt
        self.count += 1
        group, own = f"g{self.count}", object()
        names = [f"{group}.{i}" for i in range(len(outputs))]
        for name, output in zip(names, outputs, strict=True):
            self.scheduler.submit(name, prompt, scope, (), fair, group=group)
            self.know(name, prompt, scope, output, own)
        return multiple(*names)

    def know(self, name: str, prompt: list[int], scope: bytes | None, output: int, own: object | None = None) -> None:
        self.wanted[name] = list(prompt)
        self.scopes[name] = (own or object(),) if scope is None else (self.owners.setdefault(scope, object()),)
        self.steps_left[name] = min(output, self.limits.context - len(prompt))

    @rule(task=consumes(tasks), keep=st.booleans())
    def cancel(self, task: str, keep: bool) -> None:
        if task in self.wanted:
            self.finish(task, keep=keep)

    @rule(scope=st.sampled_from([b"a", b"b"]))
    def expire(self, scope: bytes) -> None:
        self.scheduler.forget(scope)

    @rule()
    def one_step(self) -> None:
        self.step()

    def step(self) -> int:
        """How many tasks it advanced."""
        plan = self.scheduler.plan()
        self.memory.execute(plan, self.scopes)
        assert self.scheduler.free_cells == self.limits.cells - self.memory.used, "the counts are those of the real cells"
        seen = len(plan.copied)
        for name in plan.copied:
            slot = self.scheduler._tasks[name].slot
            assert slot is not None
            assert [cell[0] for cell in self.memory.slots[slot.index]] == self.wanted[name], "the whole prompt is there"
            assert name not in [segment.task for segment in plan.segments]
            self.result(name)
        for segment in plan.segments:
            if segment.task is None:
                continue
            seen += 1
            held = [cell[0] for cell in self.memory.slots[segment.slot]]
            wanted = self.wanted[segment.task]
            assert held == wanted[: len(held)], "the slot holds a beginning of its task's tokens"
            assert segment.output == (len(held) == len(wanted))
            if segment.output:
                self.result(segment.task)
        return seen

    def result(self, task: str) -> None:
        self.steps_left[task] -= 1
        if self.steps_left[task] <= 0:
            self.finish(task, keep=True)
        else:
            self.wanted[task].append(7)
            self.scheduler.advance(task, 7)

    def finish(self, task: str, *, keep: bool) -> None:
        self.scheduler.end(task, keep=keep)
        del self.wanted[task]

    @rule()
    def several_steps(self) -> None:
        for _ in range(5):
            self.step()

    @invariant()
    def every_task_is_in_one_place(self) -> None:
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(known) == sorted(self.wanted)
        assert len(self.scheduler.running) <= self.limits.slots

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100_000):
            if not self.scheduler.busy:
                break
            assert self.step() > 0, "no step goes by without work while there is some"
        assert not self.wanted, "every task ended, once"
        self.scheduler.forget(b"a")
        self.scheduler.forget(b"b")
        self.memory.execute(self.scheduler.plan(), self.scopes)
        assert self.memory.used == 0
        assert self.scheduler.free_cells == self.limits.cells


class TightMachine(Machine):
    """A unified cache that four long tasks do not fit into: with sharing, eviction and preemption."""

    limits = TIGHT


class WholeMachine(Machine):
    """A model that keeps one state for each sequence."""

    limits = WHOLE


calm = settings(deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck))
TestSplit = Machine.TestCase
TestSplit.settings = calm
TestTight = TightMachine.TestCase
TestTight.settings = calm
TestWhole = WholeMachine.TestCase
TestWhole.settings = calm


# The promises, one by one


class Driver:
    """Runs a scheduler; every task generates `output` tokens."""

    def __init__(self, limits: EngineLimits = SPLIT) -> None:
        self.scheduler = Scheduler(limits)
        self.memory = Memory(limits)
        self.plans: list[StepPlan] = []
        self.left: dict[str, int] = {}
        self.owners: dict[bytes, object] = {}
        self.scopes: dict[str, tuple[object, ...]] = {}

    def submit(self, name: str, prompt: list[int], scope: bytes | None = None, output: int = 4, fair: Fair = NOBODY) -> None:
        self.scheduler.submit(name, prompt, scope, fair=fair)
        self.scopes[name] = (object() if scope is None else self.owners.setdefault(scope, object()),)
        self.left[name] = output

    def submit_choices(self, n: int, prompt: list[int], output: int = 4, fair: Fair = NOBODY) -> list[str]:
        """Of one request without a scope."""
        own, names = object(), [f"n{i}" for i in range(n)]
        for name in names:
            self.scheduler.submit(name, prompt, None, fair=fair, group="g")
            self.scopes[name], self.left[name] = (own,), output
        return names

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.memory.execute(plan, self.scopes)
        self.plans.append(plan)
        for name in [*plan.copied, *(segment.task for segment in plan.segments if segment.output)]:
            if name is not None:
                self.left[name] -= 1
                if self.left[name]:
                    self.scheduler.advance(name, 7)
                else:
                    self.scheduler.end(name)
        return plan

    def run(self) -> None:
        while self.scheduler.busy:
            self.step()

    def cached(self, name: str, prompt: list[int], scope: bytes | None) -> tuple[int, int]:
        """Tokens found in the cache, and tokens computed, for a new task."""
        self.submit(name, prompt, scope, output=1)
        found = computed = 0
        while self.scheduler.busy:
            plan = self.scheduler.plan()
            self.memory.execute(plan, self.scopes)
            found = self.scheduler.cached(name)
            computed += sum(len(s.tokens) for s in plan.segments if s.task == name)
            if any(s.output and s.task == name for s in plan.segments):
                self.scheduler.end(name)
        return found, computed


def test_generation_goes_into_every_step_and_a_long_prompt_gets_its_share() -> None:
    driver = Driver()
    for name in ("a", "b"):
        driver.submit(name, [1, 2, 3], output=30)
    driver.step()
    driver.submit("long", [5] * 100)
    for _ in range(10):
        plan = driver.step()
        assert plan.generating == 2
        assert plan.size <= 2 + SPLIT.share
        assert {s.task for s in plan.segments} == {"a", "b", "long"}


def test_an_answer_is_read_again_in_pieces_of_its_own() -> None:
    scheduler = Scheduler(EngineLimits(slots=1, context=512, cells=512))
    scheduler.submit("a", [5] * 100, None, [6] * (PIECE + 10))
    read = [segment for _ in range(3) for segment in scheduler.plan().segments]
    assert [(segment.start, len(segment.tokens)) for segment in read] == [(0, 100), (100, PIECE), (100 + PIECE, 10)]
    assert [segment.output for segment in read] == [False, False, True]


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    driver = Driver()
    driver.submit("long", [5] * 120)
    driver.step()
    driver.submit("short", [6] * 10)
    assert any(segment.task == "short" and segment.output for segment in driver.step().segments)


def test_short_prompts_do_not_starve_a_long_one() -> None:
    driver = Driver()
    driver.submit("long", [5] * 120, output=1)
    for i in range(40):
        driver.submit(f"s{i}", [6] * 16, output=1)
        driver.step()
    assert driver.left["long"] == 0


def test_a_cache_that_cannot_be_cut_is_not_reused() -> None:
    driver = Driver(WHOLE)
    prompt = [*PREFIX, 1, 2, 3]
    for name in ("first", "same"):
        assert driver.cached(name, prompt, b"a") == (0, len(prompt))


# The choices of one request


def prompt_tokens(driver: Driver, length: int) -> int:
    """How many tokens of prompts of this length were computed, over all tasks and steps."""
    segments = [segment for plan in driver.plans for segment in plan.segments if segment.task is not None]
    return sum(len(segment.tokens) for segment in segments if segment.start < length)


@pytest.mark.parametrize("length", [1, MIN_REUSE - 1, 60])
@pytest.mark.parametrize("limits", [SPLIT, TIGHT, WHOLE], ids=["split", "unified", "recurrent"])
def test_choices_read_their_prompt_once(limits: EngineLimits, length: int) -> None:
    driver = Driver(limits)
    driver.submit_choices(4, list(range(length)))
    driver.run()
    assert prompt_tokens(driver, length) == length
    assert driver.scheduler.free_cells == limits.cells, "what has no scope is gone with the last of them"


@pytest.mark.parametrize("limits", [SPLIT, TIGHT], ids=["split", "unified"])
def test_more_choices_than_slots_read_their_prompt_once(limits: EngineLimits) -> None:
    """Also those that begin when the one that read it has long ended."""
    driver = Driver(limits)
    driver.submit_choices(14, [*PREFIX])
    driver.run()
    assert prompt_tokens(driver, len(PREFIX)) == len(PREFIX)


def test_what_cannot_be_cut_is_read_once_for_as_many_choices_as_there_are_slots() -> None:
    driver = Driver(WHOLE)
    driver.submit_choices(3 * WHOLE.slots, [*PREFIX])
    driver.run()
    assert prompt_tokens(driver, len(PREFIX)) == 3 * len(PREFIX)


def test_choices_go_on_where_the_one_that_read_left() -> None:
    driver = Driver()
    names = driver.submit_choices(3, [*PREFIX])
    driver.step()
    reading = driver.scheduler.running
    assert reading == (names[0],)
    driver.scheduler.end(names[0])
    driver.run()
    assert prompt_tokens(driver, len(PREFIX)) == len(PREFIX)


def test_choices_that_wait_for_their_prompt_hold_no_slot_of_anothers() -> None:
    driver = Driver(TWO)
    driver.submit_choices(8, [5] * 400, fair=("t", "a"))
    driver.submit("other", [6] * 10, output=2, fair=("v", "v"))
    assert set(driver.step().admitted) == {"n0", "other"}


def test_a_callers_later_request_comes_after_the_choices_of_an_earlier_one() -> None:
    driver = Driver(dataclasses.replace(TWO, slots=1, cells=512))
    driver.submit_choices(4, [5] * 10, fair=("t", "a"))
    driver.submit("later", [6] * 10, fair=("t", "a"))
    driver.run()
    assert [name for plan in driver.plans for name in plan.admitted][-1] == "later"


def first_served(tasks: list[tuple[str, bytes | None, Fair]], limits: EngineLimits) -> list[str]:
    """The names, in the order in which the tasks are admitted."""
    driver = Driver(limits)
    for name, scope, fair in tasks:
        driver.submit(name, list(range(20)), scope, output=2, fair=fair)
    driver.run()
    return [name for plan in driver.plans for name in plan.admitted]


TWO = EngineLimits(slots=2, context=512, cells=1024)
FLOODS: dict[str, list[tuple[bytes | None, Fair]]] = {
    "one salt": [(b"attacker", ("a", "a"))] * 100,
    "a salt each": [(b"%d" % i, ("a", "a")) for i in range(100)],
    "no salt": [(None, ("a", "a"))] * 100,
    "a caller each": [(b"%d" % i, ("a", str(i))) for i in range(100)],
    "the victim's salt": [(b"victim", ("a", "a"))] * 100,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_many_tasks_of_one_tenant_do_not_starve_anothers_one(flood: str) -> None:
    """Served second: the first slot was free before the victim came, as far as the order of arrival tells."""
    tasks = [(f"f{i}", scope, fair) for i, (scope, fair) in enumerate(FLOODS[flood])]
    order = first_served([*tasks, ("victim", b"victim", ("v", "v"))], TWO)
    assert order.index("victim") == 1
    assert len(order) == 101


@pytest.mark.parametrize("salts", ["one", "each"])
def test_callers_of_a_tenant_share_what_it_gets(salts: str) -> None:
    tasks = [(f"f{i}", b"f" if salts == "one" else b"%d" % i, ("t", "many")) for i in range(100)]
    assert first_served([*tasks, ("one", None, ("t", "one"))], TWO).index("one") == 1


def test_choices_of_one_call_count_as_its_callers() -> None:
    """`n` choices are tasks of one caller: with all slots taken by them, the next slot is another's."""
    driver = Driver(TWO)
    for i in range(8):
        driver.submit(f"n{i}", [1] * 5, b"a", output=3, fair=("t", "a"))
    driver.step()
    driver.submit("other", [2] * 5, b"a", output=3, fair=("t", "b"))
    driver.run()
    assert [name for plan in driver.plans for name in plan.admitted][2] == "other"


def test_long_prompts_of_one_do_not_hold_up_anothers() -> None:
    """What a step has for long prompts goes to the caller for whom the least was computed."""
    driver = Driver(EngineLimits(slots=4, context=1024, cells=4096))
    driver.submit("streaming", [1], output=200, fair=("s", "s"))
    for i in range(2):
        driver.submit(f"long{i}", [5] * 900, output=1, fair=("a", "a"))
    driver.step()
    driver.step()
    driver.submit("victim", [6] * 300, output=1, fair=("v", "v"))
    steps = 0
    while driver.left["victim"]:
        driver.step()
        steps += 1
    assert steps <= 2 * -(-300 // driver.scheduler.share) + 2, "at worst it has every other step's share"
    assert driver.left["long1"]


def test_whoever_holds_the_most_cells_gives_way() -> None:
    """The victim came last, and is not sent back for another's growth."""
    driver = Driver(EngineLimits(slots=4, context=128, cells=256, unified=True, step=64, chunk=32, burst=16, share=8))
    for i in range(3):
        driver.submit(f"a{i}", [i] * 30, output=90, fair=("a", "a"))
    driver.step()
    driver.submit("victim", [7] * 10, output=60, fair=("v", "v"))
    sent_back: set[str] = set()
    while driver.left["victim"]:
        driver.step()
        sent_back |= {*driver.scheduler.waiting}
    assert sent_back
    assert "victim" not in sent_back
    driver.run()
    assert not any(driver.left.values())


def test_first_come_first_served_for_one_caller() -> None:
    driver = Driver(dataclasses.replace(SPLIT, slots=1, cells=128))
    for i in range(5):
        driver.submit(f"t{i}", [1], b"a", output=1)
    driver.run()
    assert [s.task for plan in driver.plans for s in plan.segments] == [f"t{i}" for i in range(5)]


def test_a_cancelled_tasks_slot_is_used_in_the_next_step() -> None:
    driver = Driver()
    for i in range(6):
        driver.submit(f"t{i}", [1, 2], output=50)
    driver.step()
    assert driver.scheduler.waiting == ("t5",)
    driver.scheduler.end("t2")
    assert driver.step().admitted == ("t5",)


@pytest.mark.parametrize("limits", [SPLIT, TIGHT], ids=["split", "unified"])
def test_reuse_within_a_scope_only(limits: EngineLimits) -> None:
    driver = Driver(limits)
    prompt = [*PREFIX, 1, 2, 3]
    assert driver.cached("first", prompt, b"a") == (0, len(prompt))
    assert driver.cached("same", prompt, b"a") == (len(prompt) - 1, 1)
    assert driver.cached("begins alike", [*PREFIX, 9, 9], b"a") == (len(PREFIX), 2)
    assert driver.cached("another's", prompt, b"b") == (0, len(prompt))
    assert driver.cached("nobody's", prompt, None) == (0, len(prompt))
    assert driver.cached("nobody's again", prompt, None) == (0, len(prompt))
    driver.scheduler.forget(b"a")
    assert driver.cached("forgotten", prompt, b"a") == (0, len(prompt))


@pytest.mark.parametrize("unified", [False, True])
def test_a_running_tasks_prefix_is_copied(unified: bool) -> None:
    limits = EngineLimits(slots=3, context=512, cells=1536, unified=unified)
    driver = Driver(limits)
    shared = list(range(200))
    driver.submit("first", [*shared, 1], b"a", output=30)
    driver.step()
    driver.step()
    driver.submit("stranger", [*shared, 3], b"b", output=3)
    driver.submit("second", [*shared, 2], b"a", output=3)
    plan = driver.step()
    (copy,) = [step for step in plan.memory if isinstance(step, Copy)]
    assert (copy.source, copy.keep) == (0, 200)
    assert driver.scheduler.cached("second") == 200
    assert driver.scheduler.cached("stranger") == 0
    driver.run()


def test_gaps_are_filled_where_that_lengthens_nothing() -> None:
    driver = Driver(EngineLimits(slots=4, context=1024, cells=4096))
    for i in range(4):
        driver.submit(f"t{i}", [i, 2, 3], output=4 if i == 1 else 30)
    while driver.left["t1"]:
        driver.step()
    plan = driver.step()
    assert [(s.slot, s.task is None) for s in plan.segments] == [(0, False), (1, True), (2, False), (3, False)]
    assert plan.after == (Trim(1, 0),)


def test_neighbours_run_whatever_is_cached_elsewhere() -> None:
    """Each client leaves a cache behind; the next eight run side by side all the same, and nothing is computed for gaps."""
    driver = Driver(EngineLimits(slots=16, context=256, cells=4096, multiple=4))
    for client in range(5):
        driver.submit(f"first{client}", [client, 7], b"%d" % client, output=1)
        driver.run()
        for i in range(8):
            driver.submit(f"t{client}.{i}", [client, i, 3], b"%d" % client, output=3)
        driver.step()
        plan = driver.step()
        slots = [segment.slot for segment in plan.segments]
        assert len(slots) == 8
        assert slots[-1] - slots[0] == 7
        driver.run()


def test_a_long_idle_cache_is_not_filled() -> None:
    """Its length would show in the neighbours' timing."""
    driver = Driver(EngineLimits(slots=4, context=1024, cells=4096))
    driver.submit("t0", [0, 2, 3], output=30)
    driver.submit("t1", [1] * 400, b"a", output=2)
    driver.submit("t2", [2, 2, 3], output=30)
    while driver.left["t1"]:
        driver.step()
    assert [s.slot for s in driver.step().segments] == [0, 2]


@pytest.mark.parametrize(("running", "computed"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 8), (8, 8), (9, 9)])
def test_sequences_are_made_a_round_number_where_that_is_cheaper(running: int, computed: int) -> None:
    driver = Driver(EngineLimits(slots=12, context=64, cells=12 * 64, multiple=4))
    for i in range(running):
        driver.submit(f"t{i}", [i], output=9)
    driver.step()
    plan = driver.step()
    assert (len(plan.segments), plan.generating) == (computed, running)
    assert [s.slot for s in plan.segments] == list(range(computed))


def test_no_filler_where_the_cells_are_all_taken() -> None:
    driver = Driver(EngineLimits(slots=8, context=16, cells=32, unified=True, multiple=4))
    for i in range(6):
        driver.submit(f"t{i}", [i], output=12)
    driver.run()
    assert not any(driver.left.values())


def test_preempted_tasks_come_back_with_what_they_generated() -> None:
    driver = Driver(TIGHT)
    for i in range(4):
        driver.submit(f"t{i}", [i] * 10, output=100)
    driver.run()
    assert not any(driver.left.values())
    recomputed = sum(len(s.tokens) for plan in driver.plans for s in plan.segments) - 4 * (10 + 99)
    assert recomputed > 0, "the test needs a preemption"


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"cells": 1000}, {"cells": 100}, {"share": 0}, {"slots": 60, "cells": 600}, {"chunk": 100}]
)
def test_limits_that_contradict_each_other(change: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(SPLIT, **change)


def test_what_is_not_a_task() -> None:
    scheduler = Scheduler(SPLIT)
    scheduler.submit("t", [1], None)
    for prompt in ([], [1] * 128):
        with pytest.raises(UsageError):
            scheduler.submit("u", prompt, None)
    with pytest.raises(UsageError):
        scheduler.submit("t", [1], None)


# What planning costs


@pytest.mark.parametrize("at", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7, None])
@pytest.mark.parametrize("length", [1, BLOCK, 5 * BLOCK + 30])
def test_the_common_beginning_of_two_texts(at: int | None, length: int) -> None:
    """Whether the tokens came at once or one by one. at: where they differ."""
    ours = list(range(length))
    theirs = [-1 if i == at else token for i, token in enumerate(ours)]
    grown = Tokens(theirs[: length // 2])
    for token in theirs[length // 2 :]:
        grown.append(token)
    expected = length if at is None else min(at, length)
    for other in (Tokens(theirs), grown, Tokens(theirs[: length // 3], theirs[length // 3 :])):
        assert Tokens(ours).common(other, length) == expected
    assert Tokens(ours).common(Tokens(ours, chained=False), length) == 0


class Full:
    """A scheduler whose 16 slots hold `length` tokens each, of one scope and with one beginning. Two of them run."""

    def __init__(self, length: int, *, unified: bool) -> None:
        self.length = length
        context = length + 4096
        cells = 16 * context
        self.scheduler = Scheduler(
            EngineLimits(
                16, context, cells, unified=unified, step=2 * length, chunk=length, burst=128, share=length, multiple=4
            )
        )
        for i in range(16):
            self.scheduler.submit(f"t{i}", self.prompt(i), b"s", fair=("t", str(i)))
        while self.scheduler.waiting or len(self.scheduler.running) < 16 or self.reading:
            self.step()
        for i in range(2, 16):
            self.scheduler.end(f"t{i}")
        self.scheduler.limits = dataclasses.replace(self.scheduler.limits, step=512, chunk=256, share=32)  # as in use
        self.scheduler.share = 32
        self.scheduler.plan()

    def prompt(self, i: int) -> list[int]:
        """Its own from the middle on: the dearest case for whoever looks for a common beginning."""
        return [7] * (self.length // 2) + [100 + i] * (self.length // 2)

    @property
    def reading(self) -> bool:
        return any(not self.scheduler._slots[i].generating for i in range(16))

    def step(self) -> None:
        for segment in self.scheduler.plan().segments:
            if segment.task is not None and segment.output:
                self.scheduler.advance(segment.task, 9)

    def admission(self, tasks: int = 1) -> tuple[int, int]:
        """What planning costs that admits more such prompts: instructions of Python's machine, and bytes at the peak."""
        for i in range(tasks):
            self.scheduler.submit(f"new{i}", Tokens([*self.prompt(3 + i), 1, 2, 3]), b"s", fair=("u", "u"))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        count = _instructions(self.scheduler.plan)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert self.scheduler.started("new0")
        return count, peak


def _instructions(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("unified", [False, True])
def test_planning_costs_the_same_for_a_long_context_as_for_a_short_one(unified: bool) -> None:
    """16 slots of 128k tokens: nothing in a plan may look at their cells or tokens one by one."""
    short, peak = Full(2048, unified=unified).admission()
    long, long_peak = Full(131072, unified=unified).admission()
    assert long < 2 * short, "the search for a common beginning may take a few steps more"
    assert max(peak, long_peak) < 64 * 1024, "no copy of a text or of its cells"


@pytest.mark.parametrize("unified", [False, True])
def test_many_admissions_in_one_step_cost_little_more_than_a_few(unified: bool) -> None:
    """What is left waits for the next step, a few milliseconds later, and nobody's stream waits for it."""
    few, _ = Full(2048, unified=unified).admission(4)
    full = Full(2048, unified=unified)
    many, _ = full.admission(13)
    assert many < 2 * few
    for _ in range(3):
        full.step()
    assert all(full.scheduler.started(f"new{i}") for i in range(13))
