"""Prompts beside answers: the share of a step's time that they get, and the steps that a prompt may take at most.

A simulated machine has a clock of its own: the scheduler's plans say what a step computes, and a cost says how long it takes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre_backend.engine.adapter_turns import TURN
from lacre_backend.engine.pace import GROWTH, PREFILL, PROBED, REST, Pace, SteadyPace, fitting
from lacre_backend.engine.plan import EngineLimits, StepPlan
from lacre_backend.engine.scheduler import Scheduler
from lacre_backend.engine.turns import Fair

LIMITS = EngineLimits(slots=8, context=4096, cells=8 * 4096, multiple=4)
LEARNING = 10  # steps in which the cost of a machine that was never measured is found
WARM = 40  # steps before the prompt comes


def most_steps(tokens: int) -> int:
    """The bound that docs/steps.md states, for a long prompt that is read alone."""
    return tokens + tokens // (REST - 1) + 2


@dataclass(frozen=True)
class Machine:
    """Seconds of a step: `quiet` for the answers, then `fixed` for two prompt tokens or more, and for each of them `token`, and
    `behind` for each token in front of it. noise: of equal steps.
    """

    quiet: float
    fixed: float
    token: float
    behind: float
    noise: float = 0.0

    def seconds(self, plan: StepPlan, chance: random.Random) -> float:
        reading = [segment for segment in plan.segments if segment.task == "long"]
        n = sum(len(segment.tokens) for segment in reading)
        before = sum(segment.start * len(segment.tokens) for segment in reading)
        return (self.quiet + self.fixed * (n > 1) + self.token * n + self.behind * before) * chance.lognormvariate(
            0, self.noise
        )


@dataclass(frozen=True)
class Read:
    """How a prompt was read. steps: seconds of each from its submission to its end, and its tokens in it."""

    steps: list[tuple[float, int]]

    @property
    def seconds(self) -> float:
        return sum(seconds for seconds, _ in self.steps)

    def p95(self, quiet: float, learning: int = 0) -> float:
        """Of the time between tokens, in quiet steps. learning: steps at the beginning that do not count."""
        counted = sorted(seconds for seconds, _ in self.steps[learning:]) or [0.0]
        return counted[math.ceil(0.95 * len(counted)) - 1] / quiet


def read(machine: Machine, tokens: int, *, streams: int = 7, prefill: float = PREFILL, slower: float = 1.0) -> Read:
    """Reads one prompt beside streams as the engine does. slower: all steps from the prompt's first one on."""
    pace, chance = Pace(LIMITS.share, LIMITS.most, prefill), random.Random(0)
    scheduler = Scheduler(LIMITS, pace.share)
    for i in range(streams):
        scheduler.submit(f"s{i}", [1, 2, 3], None)
    steps: list[tuple[float, int]] = []
    left = True
    for number in range(WARM + most_steps(tokens) + 1):
        if number == WARM:
            scheduler.submit("long", [5] * tokens, None)
        plan = scheduler.plan()
        seconds = machine.seconds(plan, chance) * (slower if number >= WARM else 1.0)
        took = sum(len(segment.tokens) for segment in plan.segments if segment.task == "long")
        pace.observe(plan.generating, took, seconds, plan.attended)
        if number >= WARM:
            steps.append((seconds, took))
            assert plan.generating == streams, "every answer gets a token in every step"
        for segment in plan.segments:
            if segment.task == "long" and segment.output:
                left = False
            elif segment.task is not None and segment.output:
                scheduler.advance(segment.task, 9)
        if not left:
            return Read(steps)
    raise AssertionError(f"{tokens} tokens took more than {most_steps(tokens)} steps")


HERE = Machine(0.020, 0.006, 0.0007, 0.000003)  # as measured with a small model on two cores
machines = st.builds(
    Machine,
    quiet=st.floats(0.005, 0.2),
    fixed=st.floats(0, 0.2),
    token=st.floats(0, 0.05),
    behind=st.floats(0, 0.0001),
    noise=st.floats(0, 0.3),
)


@settings(deadline=None, max_examples=30)
@given(machine=machines, tokens=st.integers(129, 1500), streams=st.integers(1, 7), slower=st.floats(0.3, 4))
@example(machine=Machine(0.005, 0.2, 0.05, 0.0001), tokens=1500, streams=7, slower=4.0)
def test_a_prompt_is_read_within_the_steps_that_the_docs_state(
    machine: Machine, tokens: int, streams: int, slower: float
) -> None:
    """On any machine, however slow reading is, and also where it becomes slower meanwhile."""
    steps = read(machine, tokens, streams=streams, slower=slower).steps
    assert len(steps) <= most_steps(tokens)
    assert sum(n for _, n in steps) == tokens
    idle = [n == 0 for _, n in steps]
    assert not any(a and b for a, b in pairwise(idle)), "a step at rest is followed by one that reads"


@pytest.mark.parametrize("tokens", [129, 400])
@pytest.mark.parametrize("others", [[("u", "b"), ("v", "c")], [("t", "b"), ("t", "c")], [("t", "a"), ("t", "a")]])
def test_several_prompts_take_so_many_times_as_long(tokens: int, others: list[Fair]) -> None:
    """At the floor, of several tenants, of several callers of one, and of one caller."""
    scheduler = Scheduler(LIMITS)
    scheduler.submit("stream", [1, 2, 3], None)
    fairs: list[Fair] = [("t", "a"), *others]
    for number, fair in enumerate(fairs):
        scheduler.submit(f"long{number}", [5] * tokens, None, fair=fair)
    done: dict[str, int] = {}
    for number in range(1, len(fairs) * most_steps(tokens) + 2):
        scheduler.share = 0 if number % REST == 0 else 1
        for segment in scheduler.plan().segments:
            if segment.task == "stream":
                scheduler.advance("stream", 9)
            elif segment.task is not None and segment.output:
                done[segment.task] = number
                scheduler.end(segment.task)
    assert len(done) == len(fairs)


@settings(deadline=None, max_examples=10)
@given(
    quiet=st.floats(0.01, 0.1), fixed=st.floats(0, 0.9), token=st.floats(0.001, 0.4), behind=st.floats(0, 0.0003),
    prefill=st.sampled_from([0.3, PREFILL, 0.7]), slower=st.sampled_from([1.0, 2.0]),
)  # fmt: skip
def test_prompts_get_their_share_of_a_step_and_no_more(
    quiet: float, fixed: float, token: float, behind: float, prefill: float, slower: float
) -> None:
    """fixed, token, behind: in quiet steps. One token is read even if it costs more than the share."""
    machine = Machine(quiet, fixed * quiet, token * quiet, behind * quiet, noise=0.02)
    stretch, one = 1 / (1 - prefill), 1 + token + 2500 * behind
    found = read(machine, 2500, prefill=prefill, slower=slower)
    most = 1.15 * max(stretch, one) + max(token + 2500 * behind, 0.1)  # one token more
    assert found.p95(quiet * slower, LEARNING) <= most


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_the_goal_is_met_and_time_is_not_wasted(slower: float) -> None:
    found = read(HERE, 4000, slower=slower)
    assert found.p95(HERE.quiet * slower) <= 2.5
    reading = found.seconds - slower * HERE.quiet * len(found.steps)
    assert reading >= 0.75 * PREFILL * found.seconds, "prompts use what they may"


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_more_tokens_are_read_where_weights_cost_the_most(slower: float) -> None:
    """A large model on a CPU: a second pass costs nearly as much as a step, and more tokens in it almost nothing."""
    weights = Machine(0.1, 0.09, 0.002, 0.0, noise=0.1)
    assert len(read(weights, 2000, slower=slower).steps) < most_steps(2000) / 2


def test_where_reading_costs_nothing_all_of_a_chunk_is_read() -> None:
    found = read(Machine(0.01, 0.0, 0.0, 0.0), 4000)
    assert max(n for _, n in found.steps) > LIMITS.most - LIMITS.multiple
    read_by_step = [n for _, n in found.steps[:-1] if n]
    assert all(b <= GROWTH * (a + LIMITS.multiple) for a, b in pairwise(read_by_step)), "it grows step by step"


def test_a_share_stretches_a_step_so_far_and_no_further() -> None:
    pace = Pace(32, 128)
    assert pace.share(7) == 32
    for _ in range(50):
        pace.observe(7, 0, 0.020)
        pace.observe(7, 32, 0.020 + 32 * 0.002)
    assert pace.share(7) == pytest.approx(PREFILL / (1 - PREFILL) * 10, abs=1)
    for _ in range(50):
        pace.observe(7, 10, 0.020 + 10 * 0.05)
    assert pace.share(7) == 1
    shares = [1]
    for _ in range(REST - 4):
        pace.observe(7, 10, 0.020)
        shares.append(pace.share(7))
    assert all(b <= GROWTH * a for a, b in pairwise(shares)), "a step that was measured too short lets no whole chunk in"
    assert shares[-1] == 128


def test_a_prompt_whose_adapter_generates_nothing_does_not_rest() -> None:
    """Only steps that generate something can rest: others would be empty."""
    scheduler = Scheduler(LIMITS)
    scheduler.submit("stream", [1, 2, 3], None)
    scheduler.plan()
    scheduler.advance("stream", 9)
    scheduler.submit("long", [5] * 300, None, adapter="x")
    scheduler.share = 0
    read: list[str | None] = []
    for _ in range(8):
        plan = scheduler.plan()
        read += [segment.task for segment in plan.segments]
        if read[-1] == "stream":
            scheduler.advance("stream", 9)
    assert {"stream", "long"} <= set(read), "adapters take turns of several steps"


parts = st.one_of(st.just(0.0), st.floats(0, 1e3), st.floats(0, 1e-300))


@settings(deadline=None)
@given(
    cost=st.tuples(parts, parts, parts), seconds=parts, place=st.integers(0, 2**20), most=st.integers(1, 16384),
)  # fmt: skip
@example(cost=(0.05, 0.0, 0.000003), seconds=0.02, place=0, most=256)  # nothing is left for a first token that costs nothing
@example(cost=(0.0, 0.0, 1e-300), seconds=1e-300, place=0, most=16384)  # their product is no number above 0
def test_whatever_the_parts_a_number_of_tokens_comes_out(
    cost: tuple[float, float, float], seconds: float, place: int, most: int
) -> None:
    n = fitting(cost, seconds, place, most)
    assert 0 <= n <= most
    fixed, token, behind = cost
    if n:
        assert fixed + (token + place * behind) * n + behind * n * n / 2 <= seconds * (1 + 1e-6)


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 256), st.integers(0, 4096), st.floats(1e-5, 30)), max_size=80),
    place=st.integers(0, 4096),
)  # fmt: skip
def test_whatever_is_measured_a_share_comes_out(steps: list[tuple[int, int, int, float]], place: int) -> None:
    """Also of a machine whose steps suddenly take many times as long, or a hundredth."""
    pace = Pace(32, 128)
    for generating, reading, start, seconds in steps:
        pace.observe(generating, reading, seconds, reading * start + reading * reading // 2)
        assert 0 <= pace.share(generating, place) <= 128
        assert 0 <= pace.share(generating, 0) <= 128


class BrokenPace(Pace):
    """Fails as no pace should."""

    def share(self, generating: int, place: int = 0, adapter: str | None = None) -> int:
        if generating == 3:
            raise ZeroDivisionError
        return super().share(generating, place, adapter)

    def observe(self, generating: int, reading: int, seconds: float, attended: int = 0) -> None:
        if generating == 3:
            raise OverflowError
        super().observe(generating, reading, seconds, attended)


def test_a_pace_that_fails_is_measured_anew_and_ends_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    made: list[Pace] = []

    def make() -> Pace:
        made.append(BrokenPace(32, 128))
        return made[-1]

    pace = SteadyPace(make)
    assert pace.share(7) == 32
    assert pace.share(3) == 1, "the floor: prompts still advance"
    assert len(made) == 2
    pace.observe(3, 0, 0.1)
    assert len(made) == 3
    assert pace.share(7) == 32, "and it learns again"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError, OverflowError]


def rounds(adapters: int, reader: int, share: Callable[[int, int, str | None], int], tokens: int = 200) -> list[int]:
    """Tokens of one adapter's prompt in each step, while an answer of each adapter takes turns. It ends with the prompt."""
    scheduler = Scheduler(EngineLimits(slots=12, context=4096, cells=12 * 4096, multiple=4), share)
    for i in range(adapters):
        scheduler.submit(f"s{i}", [1, 2, 3], None, adapter=f"a{i}")
    found: list[int] = []
    left = True
    while left and len(found) < most_of_adapters(adapters, tokens) + 100:
        if len(found) == 0 and all(scheduler.started(f"s{i}") for i in range(adapters)) and "long" not in scheduler.running:
            scheduler.submit("long", [5] * tokens, None, adapter=f"a{reader}")
        plan = scheduler.plan()
        if "long" in scheduler.running:
            found.append(sum(len(segment.tokens) for segment in plan.segments if segment.task == "long"))
        for segment in plan.segments:
            if segment.task == "long" and segment.output:
                left = False
            elif segment.task is not None and segment.output:
                scheduler.advance(segment.task, 9)
    return found


def most_of_adapters(adapters: int, tokens: int) -> int:
    """The bound that docs/steps.md states: whole turns."""
    return adapters * (most_steps(tokens) + TURN)


@pytest.mark.parametrize("adapters", [2, 7, 8])  # 8 take turns of 4 steps in 32
def test_a_prompt_is_read_within_the_bound_where_adapters_take_turns(adapters: int) -> None:
    """At the floor, whichever adapter has it: no rest of 32 steps is always the same adapter's."""
    for reader in range(adapters):
        found = rounds(adapters, reader, Pace(1, 1).share)
        assert sum(found) == 200
        assert len(found) <= most_of_adapters(adapters, 200)


@pytest.mark.parametrize("adapters", [1, 2, 4, 8])
def test_each_adapter_rests_and_is_probed_once_in_so_many_of_its_own_steps(adapters: int) -> None:
    pace = Pace(1, 128)
    for _ in range(9):
        pace.observe(1, 0, 0.01)
        pace.observe(1, 4, 10.0)
    shares: dict[str, list[int]] = {f"a{i}": [] for i in range(adapters)}
    for step in range(adapters * 4 * REST):
        adapter = f"a{step // TURN % adapters}"
        shares[adapter].append(pace.share(1, 0, adapter))
    for each in shares.values():
        assert [each.count(0), each.count(PROBED), each.count(1)] == [4, 4, 4 * REST - 8]
