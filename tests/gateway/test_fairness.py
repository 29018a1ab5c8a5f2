"""The pseudonyms of tenant and caller: the same at every gateway of a site, others every hour, and nobody's name."""

from __future__ import annotations

import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
    ("who", "same_tenant"),
    [
        (Principal("bob", "acme", "https://issuer.example"), True),
        (Principal("alice", "acme", "https://other.example"), True),
        (Principal("alice", "acne", "https://issuer.example"), False),
        (Principal("lice", "acmea", "https://issuer.example"), False),
        (Principal("", "acme", "https://issuer.examplealice"), True),
    ],
)
def test_others_have_others(who: Principal, same_tenant: bool) -> None:
    tenant, caller = of(who)
    assert (tenant == of(ALICE)[0]) is same_tenant
    assert caller != of(ALICE)[1]


def test_groups_scopes_plan_and_token_change_nothing() -> None:
    assert of(Principal("alice", "acme", "https://issuer.example", ("g",), ("s",), "gold", "a-token")) == of(ALICE)


def test_they_change_with_the_hour_and_with_the_key() -> None:
    begin = NOW // HOUR * HOUR
    assert of(ALICE, begin) == of(ALICE, begin + HOUR - 0.001)
    for other in (of(ALICE, begin - 0.001), of(ALICE, begin + HOUR), of(ALICE, key=Ed25519PrivateKey.generate())):
        assert not set(other) & set(of(ALICE, begin))


def test_a_tenant_and_a_caller_of_one_name_differ() -> None:
    assert len(set(of(Principal("x", "x", "x")))) == 2


def test_any_subject_has_one() -> None:
    assert of(Principal("\ud800", "acme", "https://issuer.example")) != of(
        Principal("\ud801", "acme", "https://issuer.example")
    )
