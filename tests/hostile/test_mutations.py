"""The list of mutations cannot rot; and, slowly, each of them is caught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.attacks import every
from hostile.mutations import MUTATIONS, ROOT, Mutation, caught, copy


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_is_of_this_tree(mutation: Mutation) -> None:
    found = (ROOT / mutation.file).read_text().count(mutation.old)
    assert found == 1, "the line has changed: change the mutation with it, and see that `make mutants` still catches it"
    assert mutation.new != mutation.old
    assert f"tests/hostile/{mutation.test}" in every()


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with copy() as tree:
        yield tree


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_is_caught(tree: Path, mutation: Mutation) -> None:
    assert caught(tree, mutation)
