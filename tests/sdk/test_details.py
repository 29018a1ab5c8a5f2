"""What a problem document says beside its type: typed members in our own words, and nothing that a document makes up."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre import problems
from lacre.errors import Detail
from lacre.problems import details
from lacre.problems.details import MAX_LISTED

WHOLE: dict[str, Detail] = {
    "limit": "tokens_per_minute", "scope": "user", "unit": "tokens", "ceiling": 1000, "asked": 1500, "remaining": 3,
    "reason": "expired", "claim": "groups", "expired_at": 1_764_400_000, "header": "lacre-pool",
    "models": ("a", "b"), "pools": ("default",), "paths": ("/v1/models",), "methods": ("GET",),
}  # fmt: skip


def test_what_is_written_is_what_is_read() -> None:
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


def test_an_error_says_which_limit_and_how_much() -> None:
    refused = problems.RATE_LIMITED.exception(
        26.0, {"limit": "tokens_per_minute", "scope": "user", "ceiling": 1000, "unit": "tokens"}
    )
    assert "The limit is tokens_per_minute of the user: at most 1000 tokens." in str(refused)
    assert refused.details["ceiling"] == 1000
    assert refused.retry_after == 26.0


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"limit": "concurrent_streams", "scope": "user", "ceiling": 32, "asked": 1, "remaining": 0,
          "unit": "concurrent-requests"},
         "The limit is concurrent_streams of the user: at most 32 requests at once, left 0."),
        ({"reason": "malformed", "claim": "groups"}, "does not accept its claim groups: malformed."),
        ({"reason": "revoked"}, "It was revoked."),
        ({"reason": "something-new"}, "The reason is something-new."),
        ({"header": "lacre-pool"}, "The header field is lacre-pool."),
    ],
)  # fmt: skip
def test_what_a_person_reads(details: dict[str, Detail], said: str) -> None:
    assert said in str(problems.RATE_LIMITED.exception(None, details))


def test_an_error_says_when_a_token_expired() -> None:
    assert "The token expired at 2025-11-29T07:06:40Z." in str(
        problems.INVALID_TOKEN.exception(details={"expired_at": 1_764_400_000})
    )


LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*WHOLE, "x"]), inner))


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_document_is_read(body: bytes) -> None:
    found = details.read(body)
    assert set(found) <= set(WHOLE)
    assert details.told(found).isascii()
    assert details.read(problems.FORBIDDEN.body(found)) == found
