"""The errors' own promises: each says what to do, and docs/errors.md lists every one as it is."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.verification import Signed, Verification
from lacre.transport.sealed import TimedOut

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


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies_hold_what_the_error_knows(error_list: ModuleType, way: Callable[[Exception], Exception]) -> None:
    """A pool of processes hands errors on by pickling them; one that cannot be read again would end the pool."""
    signed = Signed("root", "signer", 9.0, "issuer", 7, 1.0, 2.0, 0.5)
    known = Verification("pin", signed, None, None, AuditProof(b"{}", 3, (bytes(32),), b"note"))
    for kind in error_list.known():
        error = kind.__new__(kind, "what happened")
        error.verification, error.status, error.code, error.text = known, 503, "x", "so far"
        copied = way(error)
        assert type(copied) is kind
        assert (str(copied), vars(copied)) == (str(error), vars(error))


def test_copies_leave_the_prompt_where_it_is() -> None:
    error = TimedOut("late")
    error.request = httpx2.Request("POST", "https://lacre.invalid/v1/chat/completions", content=b"a secret question")
    assert b"secret" not in pickle.dumps(error)
    with pytest.raises(RuntimeError):
        _ = pickle.loads(pickle.dumps(error)).request


def test_every_public_error_is_listed(error_list: ModuleType) -> None:
    public = {each for each in vars(lacre).values() if isinstance(each, type) and issubclass(each, lacre.LacreError)}
    assert public <= error_list.known()


@pytest.mark.parametrize("problem", problems.BY_TYPE.values(), ids=lambda problem: problem.slug)
def test_a_refusals_remedy_is_its_problems(problem: problems.Problem) -> None:
    assert problem.exception().remedy == problem.remedy
