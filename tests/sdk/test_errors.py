"""The errors' own promises: each says what to do, and docs/errors.md lists every one as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import lacre
from lacre import problems

TOOL = Path(__file__).parents[2] / "tools" / "error_list.py"


@pytest.fixture(scope="module")
def error_list() -> ModuleType:
    spec = importlib.util.spec_from_file_location("error_list", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_that_of_the_code(error_list: ModuleType) -> None:
    assert error_list.DOCUMENT.read_text() == error_list.document(), "run `make errors`"


def test_each_type_says_what_to_do_in_words_of_its_own(error_list: ModuleType) -> None:
    types = error_list.known()
    assert {lacre.LacreError, lacre.StreamBroken, lacre.Unavailable} < types
    remedies = [each.__dict__.get("remedy", "") for each in types]
    assert all(remedy.endswith(".") and len(remedy) > 20 for remedy in remedies)
    assert len(set(remedies)) == len(remedies)


def test_every_public_error_is_listed(error_list: ModuleType) -> None:
    public = {each for each in vars(lacre).values() if isinstance(each, type) and issubclass(each, lacre.LacreError)}
    assert public <= error_list.known()


@pytest.mark.parametrize("problem", problems.BY_TYPE.values(), ids=lambda problem: problem.slug)
def test_a_refusals_remedy_is_its_problems(problem: problems.Problem) -> None:
    assert problem.exception().remedy == problem.remedy
