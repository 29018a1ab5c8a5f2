"""The pseudonyms of tenant and caller: the same at every gateway of a site, others every hour, and nobody's name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre_gateway.auth import pseudonyms
from lacre_gateway.auth.claims import Principal
from lacre_gateway.auth.pseudonyms import HOUR, Pseudonyms

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ALICE = Principal("alice", "acme", "https://issuer.example")
NOW = 1_800_000_000.0


def of(who: Principal, now: float = NOW, key: Ed25519PrivateKey = KEY) -> tuple[str, str]:
    return Pseudonyms(key).of(who, now)


def test_every_gateway_with_the_key_says_the_same() -> None:
    """Fixed values: gateways of two releases run side by side during an update."""
    assert of(ALICE) == of(ALICE) == ("3BXPx3YNEHGviIzkf1s6Zw", "iOw4ab8r1BvGcyx8OMDzlg")
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", pseudonym) for pseudonym in of(ALICE))


@pytest.mark.parametrize(
    ("subject", "of_tenant", "issuer", "same_tenant"),
    [
        ("bob", "acme", "https://issuer.example", True), ("alice", "acme", "https://other.example", True),
        ("alice", "acne", "https://issuer.example", False), ("lice", "acmea", "https://issuer.example", False),
        ("", "acme", "https://issuer.examplealice", True),
    ],
)  # fmt: skip
def test_others_have_others(subject: str, of_tenant: str, issuer: str, same_tenant: bool) -> None:
    tenant, caller = of(Principal(subject, of_tenant, issuer))
    assert (tenant == of(ALICE)[0]) is same_tenant
    assert caller != of(ALICE)[1]


WHO = st.builds(Principal, *(st.sampled_from(["a", "b", "ab", ""]) for _ in range(3)))


@given(st.lists(st.tuples(WHO, st.floats(NOW, NOW + 2 * HOUR)), max_size=12))
def test_pseudonyms_that_are_kept_are_the_same(asked: list[tuple[Principal, float]]) -> None:
    """Whoever asked before, and in whichever hour."""
    kept = Pseudonyms(KEY)
    assert [kept.of(*each) for each in asked] == [of(*each) for each in asked]


def test_the_pseudonyms_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudonyms, "KEPT", 3)
    kept = Pseudonyms(KEY)
    found = [kept.of(replace(ALICE, subject=str(number)), NOW) for number in range(10)]
    assert len(kept) <= 3 and len(set(found)) == 10


def test_groups_scopes_plan_and_token_change_nothing() -> None:
    assert of(replace(ALICE, groups=("g",), scopes=("s",), plan="gold", jti="a-token")) == of(ALICE)


def test_they_change_with_the_hour_and_with_the_key() -> None:
    begin = NOW // HOUR * HOUR
    assert of(ALICE, begin) == of(ALICE, begin + HOUR - 0.001)
    for other in (of(ALICE, begin - 0.001), of(ALICE, begin + HOUR), of(ALICE, key=Ed25519PrivateKey.generate())):
        assert not set(other) & set(of(ALICE, begin))


def test_a_tenant_and_a_caller_of_one_name_differ_and_any_subject_has_one() -> None:
    assert len(set(of(Principal("x", "x", "x")))) == 2
    assert of(replace(ALICE, subject="\ud800")) != of(replace(ALICE, subject="\ud801"))
