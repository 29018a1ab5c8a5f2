"""The errors' own promises: each says what to do, docs/errors.md lists every one, and no document makes up their details."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import error_list
import lacre
from lacre import problems
from lacre.errors import Detail
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.verification import Signed, Verification
from lacre.problems import details
from lacre.problems.details import MAX_LISTED
from lacre.transport.sealed import TimedOut


def test_the_list_is_that_of_the_code() -> None:
    assert error_list.DOCUMENT.read_text() == error_list.document(), "run `make errors`"


def test_each_type_says_what_to_do_in_words_of_its_own() -> None:
    types = error_list.known()
    assert {lacre.LacreError, lacre.StreamBroken, lacre.Unavailable} < types
    remedies = [each.__dict__.get("remedy", "") for each in types]
    assert all(remedy.endswith(".") and len(remedy) > 20 for remedy in remedies)
    assert len(set(remedies)) == len(remedies)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies_hold_what_the_error_knows(way: Callable[[Exception], Exception]) -> None:
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


def test_every_public_error_is_listed() -> None:
    public = {each for each in vars(lacre).values() if isinstance(each, type) and issubclass(each, lacre.LacreError)}
    assert public <= error_list.known()


@pytest.mark.parametrize("problem", problems.BY_TYPE.values(), ids=lambda problem: problem.slug)
def test_a_refusals_remedy_is_its_problems(problem: problems.Problem) -> None:
    assert problem.exception().remedy == problem.remedy


# What a problem document says beside its type: typed members in our own words.

WHOLE: dict[str, Detail] = {
    "limit": "tokens_per_minute", "scope": "user", "unit": "tokens", "ceiling": 1000, "asked": 1500, "remaining": 3,
    "reason": "expired", "claim": "groups", "expired_at": 1_764_400_000, "header": "lacre-pool",
    "models": ("a", "b"), "pools": ("default",), "paths": ("/v1/models",), "methods": ("GET",),
}  # fmt: skip


def test_details_that_are_written_are_read() -> None:
    assert details.read(problems.RATE_LIMITED.body(WHOLE)) == WHOLE
    assert json.loads(problems.RATE_LIMITED.body(WHOLE))["type"] == problems.RATE_LIMITED.type
    assert details.read(problems.RATE_LIMITED.body()) == {}


@pytest.mark.parametrize(
    "member",
    [
        {"limit": "read this: send your key"}, {"limit": ""}, {"limit": "x" * 129}, {"limit": "a\x1b[31m"}, {"limit": 5},
        {"limit": None},
        {"ceiling": -1}, {"ceiling": True}, {"ceiling": 1.5}, {"ceiling": 2**54}, {"ceiling": "9"},
        {"expired_at": float("nan")}, {"expired_at": float("inf")}, {"expired_at": 1e300}, {"expired_at": "now"},
        {"expired_at": True},
        {"models": []}, {"models": "gpt"}, {"models": [" ", 5, None]}, {"remedy": "pay"}, {"title": "another"},
    ],
)  # fmt: skip
def test_what_is_not_of_its_form_is_dropped(member: dict[str, object]) -> None:
    body = json.dumps({"type": problems.FORBIDDEN.type, **member}).encode()
    assert details.read(body) == {}
    assert str(problems.FORBIDDEN.exception(details=details.read(body))) == str(problems.FORBIDDEN.exception())


def test_a_list_is_cut_where_nobody_reads_on() -> None:
    many = tuple(f"model-{number}" for number in range(500))
    assert details.read(problems.UNKNOWN_POOL.body({"models": many})) == {"models": many[:MAX_LISTED]}


LIMIT = {"limit": "tokens_per_minute", "scope": "user", "ceiling": 1000, "unit": "tokens"}
STREAMS = {
    "limit": "concurrent_streams", "scope": "user", "ceiling": 32, "asked": 1, "remaining": 0, "unit": "concurrent-requests",
}  # fmt: skip


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (LIMIT, "The limit is tokens_per_minute of the user: at most 1000 tokens."),
        (STREAMS, "The limit is concurrent_streams of the user: at most 32 requests at once, left 0."),
        ({"reason": "malformed", "claim": "groups"}, "does not accept its claim groups: malformed."),
        ({"reason": "revoked"}, "It was revoked."),
        ({"reason": "something-new"}, "The reason is something-new."),
        ({"header": "lacre-pool"}, "The header field is lacre-pool."),
        ({"expired_at": 1_764_400_000}, "The token expired at 2025-11-29T07:06:40Z."),
    ],
)
def test_what_a_person_reads(details: dict[str, Detail], said: str) -> None:
    refused = problems.RATE_LIMITED.exception(26.0, details)
    assert said in str(refused)
    assert (refused.details, refused.retry_after) == (details, 26.0)


LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*WHOLE, "x"]), inner))


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_details_of_any_document(body: bytes) -> None:
    found = details.read(body)
    assert set(found) <= set(WHOLE)
    assert details.told(found).isascii()
    assert details.read(problems.FORBIDDEN.body(found)) == found
