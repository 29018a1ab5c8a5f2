"""Copies of idle caches: the index of them, and how the scheduler uses them."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from backend.scheduling import SAVING, Driver
from lacre_backend.engine.fillers import filled
from lacre_backend.engine.plan import Discard, EngineLimits, Restore, Save, Segment
from lacre_backend.engine.saved import MIN_SAVED, Owner, SavedCaches
from lacre_backend.engine.scheduler import MOVED
from lacre_backend.engine.slots import CacheSlot
from lacre_backend.engine.tokens import BLOCK, Tokens

MOST = 1200
# Texts that share beginnings of several lengths: a part for each block and a half
PARTS = [[part] * (3 * BLOCK // 2) for part in (1, 2)]
texts = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(lambda parts: [token for part in parts for token in part])
owners = st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([None, "x"]))


def whole_blocks(one: list[int], other: list[int]) -> int:
    """Tokens in common, in whole blocks."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same // BLOCK * BLOCK


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "find", "take", "forget"]), owners, texts), max_size=40))
@settings(deadline=None)
def test_the_index_finds_what_a_search_of_all_copies_finds(steps: list[tuple[str, Owner, list[int]]]) -> None:
    index, known = SavedCaches(MOST), dict[int, tuple[Owner, list[int]]]()
    for step, owner, text in steps:
        found, length = index.best(owner, Tokens(text), len(text) - 1)
        expected = max((whole_blocks(text[:-1], other) for who, other in known.values() if who == owner), default=0)
        assert length == expected
        assert (found is None) == (expected == 0)
        if found is not None:
            assert found.owner == owner == known[found.number][0]
            assert whole_blocks(text[:-1], known[found.number][1]) == length
        if step == "add":
            number, removed = index.add(owner, Tokens(text), len(text))
            for gone in removed:
                known.pop(gone)
            if number is not None:
                known[number] = owner, text
        elif step == "take" and found is not None:
            index.take(found.number)
            del known[found.number]
        elif step == "forget":
            for gone in index.forget(owner[0]):
                assert known.pop(gone)[0][0] == owner[0]
        assert index.cells == sum(len(text) for _, text in known.values()) <= MOST
        assert len(index) == len(known)
    for scope in (b"a", b"b"):
        index.forget(scope)
    assert (index.cells, len(index), index._owners) == (0, 0, {})


def test_the_copy_that_was_unused_for_longest_goes_first() -> None:
    index, owner = SavedCaches(3 * MIN_SAVED), (b"a", None)
    texts = [Tokens([i] * MIN_SAVED) for i in range(4)]
    first, second, third = (index.add(owner, text, MIN_SAVED)[0] for text in texts[:3])
    assert first is not None
    assert index.put_back(index.take(first)) == [], "and so it was used last"
    assert index.add(owner, texts[3], MIN_SAVED)[1] == [second]
    assert index.add(owner, texts[2], MIN_SAVED) == (None, []), "there is one"
    assert index.add(owner, Tokens([9] * 4 * MIN_SAVED), 4 * MIN_SAVED) == (None, []), "larger than all of it"
    assert index.add(owner, Tokens([9] * MIN_SAVED), MIN_SAVED - 1) == (None, []), "not worth it"
    longer = index.add(owner, Tokens([2] * (MIN_SAVED + BLOCK)), MIN_SAVED + BLOCK)[1]
    assert longer[0] == third, "it begins with that one"


# The scheduler


class Saving(RuleBasedStateMachine):
    """Long texts of two scopes and two adapters, in three slots. Now and then no copy opens."""

    limits = SAVING

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(self.limits)

    @rule(owner=owners, text=texts, output=st.integers(1, 12), n=st.integers(1, 3))
    def submit(self, owner: tuple[bytes, str | None], text: list[int], output: int, n: int) -> None:
        names = [f"t{len(self.driver.left) + i}" for i in range(n)]
        for name in names:
            self.driver.submit(name, text[:500], owner[0], output, group=names[0] if n > 1 else None, adapter=owner[1])

    @rule(keep=st.booleans(), which=st.integers(0, 9))
    def cancel(self, keep: bool, which: int) -> None:
        if self.driver.wanted:
            self.driver.end([*self.driver.wanted][which % len(self.driver.wanted)], keep=keep)

    @rule(scope=st.sampled_from([b"a", b"b"]))
    def expire(self, scope: bytes) -> None:
        self.driver.scheduler.forget(scope)

    @rule(broken=st.sampled_from([False, False, True]), times=st.integers(1, 30))
    def steps(self, broken: bool, times: int) -> None:
        self.driver.memory.broken = broken
        for _ in range(times):
            self.driver.step()

    def teardown(self) -> None:
        self.driver.run()
        for scope in (b"a", b"b"):
            self.driver.scheduler.forget(scope)
        self.driver.step()
        assert (self.driver.memory.used, self.driver.memory.copies) == (0, {})


TestSaving: Any = Saving.TestCase
TestSaving.settings = settings(deadline=None, max_examples=80, stateful_step_count=30, suppress_health_check=list(HealthCheck))


def pushed_out(limits: EngineLimits = SAVING, length: int = 300) -> Driver:
    """A text of scope a had its slot, and texts of scope b have pushed it out."""
    driver = Driver(limits)
    driver.submit("a", [1] * length, b"a")
    driver.run()
    push(driver, limits.slots, length)
    return driver


def push(driver: Driver, n: int, length: int = 300) -> None:
    for _ in range(n):
        number = len(driver.left)
        driver.submit(f"o{number}", [10 + number] * length, b"b")
        driver.run()


def moves(driver: Driver, kind: type[Any]) -> list[Any]:
    return [step for plan in driver.plans for step in plan.memory if isinstance(step, kind)]


def test_a_cache_that_lost_its_slot_comes_back() -> None:
    driver = pushed_out()
    assert next(step.scope for step in moves(driver, Save)) == b"a"
    driver.submit("back", [1] * 300 + [2] * 20, b"a")
    driver.run()
    (restored,) = moves(driver, Restore)
    assert restored.keep == driver.found["back"] == 303 // BLOCK * BLOCK
    assert Discard(restored.number) in moves(driver, Discard), "the slot has it now"
    assert driver.computed(320, "back") == 320 - restored.keep


def test_nobody_else_gets_it() -> None:
    driver = pushed_out()
    for name, scope, adapter in (("b", b"b", None), ("x", b"a", "x"), ("none", None, None)):
        driver.submit(name, [1] * 300, scope, adapter=adapter)
        driver.run()
        assert driver.found[name] == 0
    assert moves(driver, Restore) == []


def test_without_the_limit_nothing_is_copied() -> None:
    driver = pushed_out(dataclasses.replace(SAVING, saved=0))
    driver.submit("back", [1] * 300, b"a")
    driver.run()
    assert (driver.found["back"], moves(driver, Save), moves(driver, Restore)) == (0, [], [])


def test_a_copy_that_does_not_open_is_read_again() -> None:
    driver = pushed_out()
    driver.memory.broken = True
    driver.submit("back", [1] * 300, b"a")
    driver.run()
    (restored,) = moves(driver, Restore)
    assert driver.computed(300, "back") == 300
    assert restored.number not in driver.memory.copies


def test_what_is_being_restored_is_not_copied_from() -> None:
    """The same text twice at once: only one of them has the copy, and it does not open."""
    driver = pushed_out()
    driver.memory.broken = True
    driver.submit("one", [1] * 300, b"a")
    driver.submit("two", [1] * 310, b"a")
    driver.run()
    assert len(moves(driver, Restore)) == 1
    assert driver.found["one"] == 0


def test_no_filler_follows_what_is_being_restored() -> None:
    """It would be in no place of a text if that fails."""
    slots = [CacheSlot(number) for number in range(3)]
    ends = [Segment(number, 0, [1], str(number), True) for number in (0, 2)]
    for slots[1].restored, expected in ((0, 3), (64, 2)):
        assert len(filled(ends, None, slots, SAVING, 100)[0]) == expected


def test_what_it_has_in_common_with_another_text_stays() -> None:
    """Two texts of one scope begin alike. Both come back."""
    driver = Driver(SAVING)
    for name, tail in (("one", 2), ("two", 3)):
        driver.submit(name, [1] * 130 + [tail] * 200, b"a")
        driver.run()
    push(driver, SAVING.slots)
    for name, tail in (("one", 2), ("two", 3)):
        driver.submit(f"{name} again", [1] * 130 + [tail] * 210, b"a")
        driver.run()
        assert driver.found[f"{name} again"] >= 320


def test_a_step_beside_answers_moves_few_tokens() -> None:
    limits = EngineLimits(slots=6, context=MOVED, cells=6 * MOVED, step=2048, chunk=1024, saved=20 * MOVED)
    driver = Driver(limits)
    for number in range(5):
        driver.submit(f"o{number}", [10 + number] * (MOVED - 100), b"b")
    driver.submit("stream", [5], output=500)
    driver.run("o4")
    for number in range(5):
        driver.submit(f"n{number}", [30 + number] * 10, b"c")
    before = len(driver.plans)
    driver.run("n4")
    moved = [sum(step.length for step in plan.memory if isinstance(step, Save)) for plan in driver.plans[before:]]
    assert sum(map(bool, moved)) >= 2, "they are there to be copied"
    assert max(moved) <= 2 * MOVED
    assert all(plan.generating for plan in driver.plans[before:])
