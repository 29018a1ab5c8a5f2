"""The list of mutations cannot rot; and, slowly, each of them is caught."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostile.attacks import every
from hostile.mutation import ROOMS, Mutation, NotFound
from hostile.mutations import MUTATIONS, ROOT, copy, survivor
from hostile.warm import Warm

SOURCE = """
LIMIT = 4

class Door:
    def enter(self, size):
        # the comment and the layout may change
        if (size >
                LIMIT):
            raise ValueError(size)
        try:
            self.opened(by="us",
                        limit=LIMIT)
        except (OSError, ValueError) as exc:
            log(exc)
        def later():
            return size + 1
        return size

    def leave(self):
        self.close()
        self.forget()
        self.forget()
"""
DOOR = {
    ("room:Door.enter", "if size > LIMIT:", "if False:"): "if False:\n            raise ValueError(size)",
    ("room:Door.enter", "size > LIMIT", "True"): "if True:\n            raise ValueError(size)",
    ("room:Door.enter", "limit=LIMIT", "limit=9"): "self.opened(by='us', limit=9)",
    ("room:Door.enter", "limit=LIMIT", ""): "self.opened(by='us')",
    ("room:Door.enter", "except (OSError, ValueError) as exc:", "except OSError as exc:"): "except OSError as exc:\n",
    ("room:Door.enter.later", "return size + 1", "return 0"): "return 0",
    ("room:Door.leave", "self.close()", ""): "def leave(self):\n        pass\n        self.forget()",
    ("room:Door.leave", "self.close()", "return None"): "def leave(self):\n        return None\n        self.forget()",
    ("room", "LIMIT = 4", "LIMIT = 0"): "LIMIT = 0",
    ("room", "class Door:", "class Door(Base):"): "class Door(Base):\n\n    def enter",
}  # fmt: skip
SWALLOWS = """
import asyncio, time

async def test_loops():
    def busy():
        if not swallowed:
            try:
                time.sleep(60)
            except BaseException:
                print("rang")
                swallowed.append(1)
                raise
    swallowed = []
    asyncio.get_running_loop().call_soon(busy)
    await asyncio.sleep(60)
"""
LOST = {
    "another function": ("room:Door.go", "self.close()", ""),
    "another statement": ("room:Door.leave", "self.open()", ""),
    "inside another function": ("room:Door.enter", "return size + 1", ""),
    "twice": ("room:Door.leave", "self.forget()", ""),
}


@pytest.mark.parametrize("place", DOOR, ids=" ".join)
def test_finds_a_statement_by_its_meaning(place: tuple[str, str, str]) -> None:
    changed = Mutation("doors: door", "a door", *place).applied(SOURCE)
    assert DOOR[place] in changed
    assert len(ast.parse(changed).body) == 2


@pytest.mark.parametrize("place", LOST.values(), ids=LOST)
def test_a_place_that_is_gone_or_doubled_is_an_error(place: tuple[str, str, str]) -> None:
    with pytest.raises(NotFound):
        Mutation("doors: door", "a door", *place).applied(SOURCE)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_is_of_this_tree(mutation: Mutation) -> None:
    source = mutation.path(ROOT).read_text()
    try:
        changed = mutation.applied(source)
    except NotFound as lost:
        pytest.fail(f"{lost}: change the mutation with the product, and see that `make mutants` still catches it")
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert f"tests/hostile/{mutation.test}" in every()


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with copy() as tree:
        yield tree


@pytest.fixture(scope="module")
def warm(tree: Path) -> Iterator[Warm]:
    with Warm.of(tree, ROOMS) as warm:
        yield warm


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_is_caught(warm: Warm, tree: Path, mutation: Mutation) -> None:
    if said := survivor(warm, tree, mutation):
        pytest.fail(said)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_hangs_is_killed_and_its_late_answer_passed_over(warm: Warm) -> None:
    test = f"tests/hostile/{MUTATIONS[0].test}"
    assert warm.run(test, patience=0)[0] == -9
    print('[-7, ["tests/hostile/none.py"], 90]', file=warm._requests)  # nobody waits for its answer, a 4
    assert warm.run(test)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_alarm_that_a_callback_swallows_rings_again(warm: Warm, tree: Path) -> None:
    (tree / "tests/hostile/test_loops.py").write_text(SWALLOWS)
    status, said = warm.run("tests/hostile/test_loops.py")
    assert status == 1 and "Timeout (>10.0s)" in said
    assert said.count("rang") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_no_attack_notices_is_not_caught_and_a_changed_source_is_read_again(warm: Warm, tree: Path) -> None:
    defence = MUTATIONS[0]
    assert "ended with 0" in survivor(warm, tree, replace(defence, new=defence.old))
    assert not survivor(warm, tree, defence)
    assert warm.run(f"tests/hostile/{defence.test}")[0] == 0
    assert "ended with 4" in survivor(warm, tree, replace(defence, by="trust: nobody"))  # there is no such test
