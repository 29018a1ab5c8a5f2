"""The scheduler as a state machine, and the promises it makes one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from backend.scheduling import FOUR, SPLIT, TIGHT, TWO, WHOLE, Driver
from lacre.errors import UsageError
from lacre_backend.engine.plan import Copy, EngineLimits, Trim
from lacre_backend.engine.reuse import MIN_REUSE
from lacre_backend.engine.scheduler import PIECE, Scheduler
from lacre_backend.engine.turns import Fair

PREFIX = list(range(100, 100 + 3 * MIN_REUSE))


fairs = st.sampled_from([("t", "a"), ("t", "b"), ("u", "c")])
adapters = st.sampled_from([None, "x", "y"])
scopes = st.sampled_from([None, None, b"a", b"a", b"b"])
prompts, begun = (st.lists(st.integers(0, 3), min_size=least, max_size=most) for least, most in ((1, 60), (0, 8)))
lengths = st.integers(1, 12)
outputs = st.lists(lengths, min_size=2, max_size=8)


class Machine(RuleBasedStateMachine):
    limits = SPLIT
    tasks = Bundle("tasks")

    @initialize()
    def begin(self) -> None:
        self.driver = Driver(self.limits)

    @rule(
        target=tasks, scope=scopes, common=st.integers(0, 3 * MIN_REUSE), own=prompts, begun=begun, output=lengths, fair=fairs,
        adapter=adapters,
    )  # fmt: skip
    def submit(self, scope: bytes | None, common: int, own: list[int], begun: list[int], output: int, fair: Fair,
               adapter: str | None) -> str:  # fmt: skip
        name = f"t{len(self.driver.left)}"
        self.driver.submit(name, PREFIX[:common] + own, scope, output, fair, begun, adapter=adapter)
        return name

    @rule(target=tasks, scope=scopes, prompt=prompts, outputs=outputs, fair=fairs, reuse=st.booleans(), adapter=adapters)
    def submit_choices(self, scope: bytes | None, prompt: list[int], outputs: list[int], fair: Fair, reuse: bool,
                       adapter: str | None) -> Any:  # fmt: skip
        group = f"g{len(self.driver.left)}"
        names = [f"{group}.{i}" for i in range(len(outputs))]
        for name, output in zip(names, outputs, strict=True):
            self.driver.submit(name, PREFIX[: 40 * reuse] + prompt, scope, output, fair, group=group, adapter=adapter)
        return multiple(*names)

    @rule(task=consumes(tasks), keep=st.booleans())
    def cancel(self, task: str, keep: bool) -> None:
        if task in self.driver.wanted:
            self.driver.end(task, keep=keep)

    @rule(scope=st.sampled_from([b"a", b"b"]))
    def expire(self, scope: bytes) -> None:
        self.driver.scheduler.forget(scope)

    @rule(times=st.sampled_from([1, 5]))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.driver.step()

    @rule(guesses=st.lists(st.lists(st.sampled_from([7, 7, 7, 8]), max_size=20), max_size=8))
    def guess(self, guesses: list[list[int]]) -> None:
        """For some tasks, whether they generate or not."""
        self.driver.step(dict(zip(self.driver.wanted, guesses, strict=False)))

    @invariant()
    def every_task_is_in_one_place(self) -> None:
        scheduler = self.driver.scheduler
        assert sorted([*scheduler.running, *scheduler.waiting]) == sorted(self.driver.wanted)
        assert len(scheduler.running) <= self.limits.slots

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run()
            self.expire(b"a")
            self.expire(b"b")
            self.driver.step()
            assert self.driver.memory.used == 0


def machine(limits: EngineLimits) -> Any:
    case = type("Limited", (Machine,), {"limits": limits}).TestCase  # type: ignore[attr-defined]
    case.settings = settings(deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck))
    return case


TestSplit = machine(SPLIT)
TestTight = machine(TIGHT)  # a unified cache that four long tasks do not fit into: sharing, eviction and preemption
TestWhole = machine(WHOLE)  # a model that keeps one state for each sequence


# The promises, one by one


def test_generation_goes_into_every_step_and_a_long_prompt_gets_its_share() -> None:
    driver = Driver()
    driver.submit_many([[1, 2, 3]] * 2, output=30)
    driver.step()
    driver.submit("long", [5] * 100)
    for _ in range(10):
        plan = driver.step()
        assert plan.generating == 2
        assert plan.size <= 2 + SPLIT.share
        assert {s.task for s in plan.segments} == {"t0", "t1", "long"}


def test_an_answer_is_read_again_in_pieces_of_its_own() -> None:
    scheduler = Scheduler(EngineLimits(slots=1, context=512, cells=512))
    scheduler.submit("a", [5] * 100, None, [6] * (PIECE + 10))
    read = [segment for _ in range(3) for segment in scheduler.plan().segments]
    assert [(segment.start, len(segment.tokens)) for segment in read] == [(0, 100), (100, PIECE), (100 + PIECE, 10)]
    assert [segment.output for segment in read] == [False, False, True]


def test_short_and_long_prompts_do_not_wait_for_each_other() -> None:
    driver = Driver()
    driver.submit("long", [5] * 120, output=1)
    driver.step()
    for i in range(40):
        driver.submit(f"s{i}", [6] * 16, output=1)
        assert any(segment.task == f"s{i}" and segment.output for segment in driver.step().segments)
    assert driver.left["long"] == 0


def test_the_end_of_a_long_prompt_stalls_nobody_either() -> None:
    """What is left of it becomes as short as a short prompt, and is read in shares all the same."""
    driver = Driver()
    driver.submit("stream", [6] * 4, output=60)
    driver.step()
    driver.submit("long", [5] * 100, output=1)
    read = []
    while driver.left["long"]:
        read += [len(segment.tokens) for segment in driver.step().segments if segment.task == "long"]
    assert sum(read) == 100
    assert max(read) <= SPLIT.share


# The choices of one request

ALL = pytest.mark.parametrize("limits", [SPLIT, TIGHT, WHOLE], ids=["split", "unified", "recurrent"])


@ALL
@pytest.mark.parametrize("length", [1, MIN_REUSE - 1, 60])
def test_choices_read_their_prompt_once(limits: EngineLimits, length: int) -> None:
    driver = Driver(limits)
    driver.submit_choices(4, list(range(length)))
    driver.run()
    assert driver.computed(length) == length
    assert driver.scheduler.free_cells == limits.cells, "what has no scope is gone with the last of them"


@ALL
def test_more_choices_than_slots_read_their_prompt_once(limits: EngineLimits) -> None:
    """Also those that begin when the one that read it has long ended. A state that cannot be cut is read once a round."""
    driver = Driver(limits)
    driver.submit_choices(3 * limits.slots, PREFIX)
    driver.run()
    assert driver.computed(len(PREFIX)) == (1 if limits.cuttable else 3) * len(PREFIX)


def test_choices_go_on_where_the_one_that_read_left() -> None:
    driver = Driver()
    driver.submit_choices(3, PREFIX)
    driver.step()
    assert driver.scheduler.running == ("n0",)
    driver.end("n0")
    driver.run()
    assert driver.computed(len(PREFIX)) == len(PREFIX)


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
    assert driver.admitted[-1] == "later"


# Whose turn it is

FLOODS: dict[str, list[tuple[bytes | None, Fair]]] = {
    "one salt": [(b"attacker", ("a", "a"))] * 100,
    "a salt each": [(b"%d" % i, ("a", "a")) for i in range(100)],
    "no salt": [(None, ("a", "a"))] * 100,
    "a caller each": [(b"%d" % i, ("a", str(i))) for i in range(100)],
    "the victim's salt": [(b"victim", ("a", "a"))] * 100,
    "the victim's tenant": [(b"attacker", ("v", "a"))] * 100,
    "the victim's tenant, a salt each": [(b"%d" % i, ("v", "a")) for i in range(100)],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_many_tasks_of_one_tenant_or_caller_do_not_starve_anothers_one(flood: str) -> None:
    """Served second: the first slot was free before the victim came, as far as the order of arrival tells."""
    driver = Driver(TWO)
    for i, (scope, fair) in enumerate(FLOODS[flood]):
        driver.submit(f"f{i}", list(range(20)), scope, output=2, fair=fair)
    driver.submit("victim", list(range(20)), b"victim", output=2, fair=("v", "v"))
    driver.run()
    assert driver.admitted.index("victim") == 1
    assert len(driver.admitted) == 101


def test_choices_of_one_call_count_as_its_callers() -> None:
    """`n` choices are tasks of one caller: with all slots taken by them, the next slot is another's."""
    driver = Driver(TWO)
    driver.submit_many([[1] * 5] * 8, b"a", output=3, fair=("t", "a"))
    driver.step()
    driver.submit("other", [2] * 5, b"a", output=3, fair=("t", "b"))
    driver.run()
    assert driver.admitted[2] == "other"


def test_long_prompts_of_one_do_not_hold_up_anothers() -> None:
    """What a step has for long prompts goes to the caller for whom the least was computed."""
    driver = Driver(FOUR)
    driver.submit("streaming", [1], output=200, fair=("s", "s"))
    driver.submit_many([[5] * 900] * 2, output=1, fair=("a", "a"))
    driver.step()
    driver.step()
    driver.submit("victim", [6] * 300, output=1, fair=("v", "v"))
    driver.run("victim")
    assert len(driver.plans) - 2 <= 2 * -(-300 // driver.scheduler.share) + 2, "at worst it has every other step's share"
    assert driver.left["t1"]


def test_whoever_holds_the_most_cells_gives_way() -> None:
    """The victim came last, and is not sent back for another's growth."""
    driver = Driver(EngineLimits(slots=4, context=128, cells=256, unified=True, step=64, chunk=32, burst=16, share=8))
    driver.submit_many([[i] * 30 for i in range(3)], output=90, fair=("a", "a"))
    driver.step()
    driver.submit("victim", [7] * 10, output=60, fair=("v", "v"))
    sent_back: set[str] = set()
    while "victim" in driver.wanted:
        driver.step()
        sent_back |= {*driver.scheduler.waiting}
    assert sent_back
    assert "victim" not in sent_back
    driver.run()


def test_first_come_first_served_for_one_caller() -> None:
    driver = Driver(dataclasses.replace(SPLIT, slots=1, cells=128))
    driver.submit_many([[1]] * 5, b"a", output=1)
    driver.run()
    assert [s.task for plan in driver.plans for s in plan.segments] == [f"t{i}" for i in range(5)]


def test_a_cancelled_tasks_slot_is_used_in_the_next_step() -> None:
    driver = Driver()
    driver.submit_many([[1, 2]] * 6, output=50)
    driver.step()
    assert driver.scheduler.waiting == ("t5",)
    driver.end("t2")
    assert driver.step().admitted == ("t5",)


# The cache


@ALL
def test_reuse_within_a_scope_only(limits: EngineLimits) -> None:
    """And none of a state that cannot be cut."""
    driver, prompt = Driver(limits), [*PREFIX, 1, 2, 3]
    for name, scope, after, cached in (
        ("first", b"a", [1, 2, 3], 0),
        ("same", b"a", [1, 2, 3], len(prompt) - 1),
        ("begins alike", b"a", [9, 9], len(PREFIX)),
        ("another's", b"b", [1, 2, 3], 0),
        ("nobody's", None, [1, 2, 3], 0),
        ("nobody's again", None, [1, 2, 3], 0),
        ("forgotten", b"a", [1, 2, 3], 0),
    ):
        if name == "forgotten":
            driver.scheduler.forget(b"a")
        found = cached if limits.cuttable else 0
        driver.submit(name, [*PREFIX, *after], scope, output=1)
        driver.run()
        length = len(PREFIX) + len(after)
        assert (driver.found[name], driver.computed(length, name)) == (found, length - found), name


@pytest.mark.parametrize("unified", [False, True])
def test_a_running_tasks_prefix_is_copied(unified: bool) -> None:
    driver, shared = Driver(EngineLimits(slots=3, context=512, cells=1536, unified=unified)), list(range(200))
    driver.submit("first", [*shared, 1], b"a", output=30)
    driver.step()
    driver.step()
    driver.submit("stranger", [*shared, 3], b"b", output=3)
    driver.submit("second", [*shared, 2], b"a", output=3)
    (copy,) = [step for step in driver.step().memory if isinstance(step, Copy)]
    assert (copy.source, copy.keep) == (0, 200)
    assert (driver.found["second"], driver.found["stranger"]) == (200, 0)
    driver.run()


# Gaps


def test_gaps_are_filled_where_that_lengthens_nothing() -> None:
    driver = Driver(FOUR)
    for i in range(4):
        driver.submit(f"t{i}", [i, 2, 3], output=4 if i == 1 else 30)
    driver.run("t1")
    plan = driver.step()
    assert [(s.slot, s.task is None) for s in plan.segments] == [(0, False), (1, True), (2, False), (3, False)]
    assert plan.after == (Trim(1, 0),)


def test_neighbours_run_whatever_is_cached_elsewhere() -> None:
    """Each client leaves a cache behind; the next eight run side by side all the same, and nothing is computed for gaps."""
    driver = Driver(EngineLimits(slots=16, context=256, cells=4096, multiple=4))
    for client in range(5):
        driver.submit("first", [client, 7], b"%d" % client, output=1)
        driver.run()
        driver.submit_many([[client, i, 3] for i in range(8)], b"%d" % client, output=3)
        driver.step()
        slots = [segment.slot for segment in driver.step().segments]
        assert (len(slots), slots[-1] - slots[0]) == (8, 7)
        driver.run()


def test_a_long_idle_cache_is_not_filled() -> None:
    """Its length would show in the neighbours' timing."""
    driver = Driver(FOUR)
    driver.submit("t0", [0, 2, 3], output=30)
    driver.submit("t1", [1] * 400, b"a", output=2)
    driver.submit("t2", [2, 2, 3], output=30)
    driver.run("t1")
    assert [s.slot for s in driver.step().segments] == [0, 2]


@pytest.mark.parametrize(("running", "computed"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 8), (8, 8), (9, 9)])
def test_sequences_are_made_a_round_number_where_that_is_cheaper(running: int, computed: int) -> None:
    driver = Driver(EngineLimits(slots=12, context=64, cells=12 * 64, multiple=4))
    driver.submit_many([[i] for i in range(running)], output=9)
    driver.step()
    plan = driver.step()
    assert plan.generating == running
    assert [s.slot for s in plan.segments] == list(range(computed))


def test_no_filler_where_the_cells_are_all_taken() -> None:
    driver = Driver(EngineLimits(slots=8, context=32, cells=181, unified=True, multiple=4))  # two more would not fit at the end
    driver.submit_many([[i] * 5 for i in range(6)], output=29)
    driver.run()


def test_preempted_tasks_come_back_with_what_they_generated() -> None:
    driver = Driver(TIGHT)
    driver.submit_many([[i] * 10 for i in range(4)], output=100)
    driver.run()
    assert driver.computed(TIGHT.context) > 4 * (10 + 99), "the test needs a preemption"


@pytest.mark.parametrize(("name", "prompt"), [("u", []), ("u", [1] * 128), ("t", [1])], ids=["empty", "too long", "known"])
def test_what_is_not_a_task(name: str, prompt: list[int]) -> None:
    scheduler = Scheduler(SPLIT)
    scheduler.submit("t", [1], None)
    with pytest.raises(UsageError):
        scheduler.submit(name, prompt, None)
