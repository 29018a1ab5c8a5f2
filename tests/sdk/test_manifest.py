"""Manifests, and the statements that all signed formats are: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.jose import jws
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, b64u_decode, raw_public_key, sign
from lacre.trust.chain import verify
from lacre.trust.manifest import MANIFEST_TYP, Document, Manifest, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import ALL_ALGORITHMS, Kem, KeyConfig

NOW = 1_800_000_000.0
ROOT, SIGNER = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2))
CHAIN = (sign_statement(RootStatement(raw_public_key(SIGNER), NOW + 1e9), ROOT),)
REFUSED = (errors.ProtocolError, errors.VerificationError)

NAMES = st.text(max_size=12)
TIMES = st.floats(0, NOW, width=32) | st.integers(0, int(NOW)).map(float)
KEYS = st.binary(min_size=32, max_size=32)


@st.composite
def configs(draw: st.DrawFn) -> KeyConfig:
    kem = draw(st.sampled_from(Kem))
    algorithms = tuple(draw(st.lists(st.sampled_from(ALL_ALGORITHMS), min_size=1, unique=True)))
    return KeyConfig(draw(st.integers(0, 255)), kem, draw(st.binary(min_size=1, max_size=4)).ljust(kem.n_pk, b"\1"), algorithms)


NAME_LISTS = st.lists(NAMES, max_size=3).map(tuple)
POOL_KEYS = st.builds(PoolKey, configs(), TIMES)
POOLS = st.builds(Pool, NAME_LISTS, st.lists(POOL_KEYS, max_size=3).map(tuple), KEYS, NAME_LISTS)
MANIFESTS = st.builds(
    Manifest, NAMES, st.integers(0, 2**53), TIMES, TIMES.map(lambda time: time + NOW + 1), KEYS,
    st.dictionaries(NAMES, POOLS, max_size=3),
)  # fmt: skip
STATEMENTS = st.builds(RootStatement, KEYS, TIMES, st.none() | KEYS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
EXAMPLE = Manifest(
    "test", 1, NOW, NOW + 1, bytes(32),
    {"default": Pool(("tiny",), (PoolKey(KeyConfig(1, Kem.X25519, b"\1" * 32), NOW),), bytes(32), ("pad",))},
)  # fmt: skip
MEMBERS = [
    *((name,) for name in EXAMPLE.members()),
    *(("pools", "default", name) for name in ("models", "keys", "receipt_key", "shapes")),
    *(("pools", "default", "keys", 0, name) for name in ("config", "not_after")),
]


def served(members: dict[str, Any]) -> bytes:
    return Document(CHAIN, sign(members, SIGNER, MANIFEST_TYP)).encode()


def example_and(path: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The example's members, and the object in them that `path` leads into."""
    members = json.loads(json.dumps(EXAMPLE.members()))
    inner = members
    for step in path[:-1]:
        inner = inner[step]
    return members, inner


@given(MANIFESTS)
@settings(deadline=None)
def test_a_manifest_is_read_back(manifest: Manifest) -> None:
    document = Document(CHAIN, sign_manifest(manifest, SIGNER))
    assert verify(document.encode(), raw_public_key(ROOT), NOW).manifest == manifest
    assert Document.parse(document.encode()) == document


@given(MANIFESTS)
@settings(deadline=None)
def test_there_is_one_way_to_write_a_manifest(manifest: Manifest) -> None:
    """Ed25519 is deterministic: the same manifest is the same bytes, so the rule of one version, one manifest, can hold."""
    again = Manifest.parse(Members(json.loads(json.dumps(manifest.members())), "the manifest"))
    assert sign_manifest(again, SIGNER) == sign_manifest(manifest, SIGNER)


@given(STATEMENTS)
def test_a_root_statement_is_read_back(statement: RootStatement) -> None:
    read = RootStatement.parse(Members(json.loads(statement.payload()), "a root statement"))
    assert read == statement
    assert read.payload() == statement.payload()


@given(st.sampled_from(MEMBERS), st.text(max_size=8).map(lambda name: f"x-{name}"), JSON)
def test_unknown_members_are_passed_over(path: tuple[Any, ...], name: str, value: object) -> None:
    members, inner = example_and(path)
    inner[name] = value
    assert verify(served(members), raw_public_key(ROOT), NOW).manifest == EXAMPLE


@pytest.mark.parametrize("path", MEMBERS, ids=lambda path: ".".join(map(str, path)))
def test_no_member_may_be_missing(path: tuple[Any, ...]) -> None:
    members, inner = example_and(path)
    del inner[path[-1]]
    with pytest.raises(errors.InvalidMessage):
        verify(served(members), raw_public_key(ROOT), NOW)


@given(st.sampled_from(MEMBERS), JSON)
@example(("ver",), True)
@example(("ver",), -1)
@example(("exp",), 10**400)
@example(("exp",), float("inf"))
@example(("pools", "default", "keys", 0, "config"), "0000")
def test_another_value_is_read_as_it_is_or_refused(path: tuple[Any, ...], value: object) -> None:
    members, inner = example_and(path)
    inner[path[-1]] = value
    try:
        manifest = verify(served(members), raw_public_key(ROOT), NOW).manifest
    except REFUSED:
        return
    again = manifest.members()
    for step in path:
        if again == []:  # the key is of a suite that the SDK does not know yet, so it was left out
            return
        again = again[step]
    assert again == value
    assert isinstance(again, bool) == isinstance(value, bool)  # which Python holds to be a number
    assert manifest.version >= 0


@given(st.binary(max_size=40), st.integers(0, 60), st.sampled_from("AQz09-_+/=. \n"))
def test_base64url_has_one_form(data: bytes, place: int, letter: str) -> None:
    text = b64u(data)
    assert b64u_decode(text) == data
    other = text[: place % (len(text) + 1)] + letter + text[place % (len(text) + 1) + 1 :]
    try:
        decoded = b64u_decode(other)
    except errors.InvalidMessage:
        return
    assert b64u(decoded) == other


TYP, SAID = "lacre-grant+jwt", {"jti": "x", "exp": 7}


def signed(header: dict[str, str], payload: bytes = b'{"jti":"x","exp":7}') -> str:
    text = f"{b64u(json.dumps(header).encode())}.{b64u(payload)}"
    return f"{text}.{b64u(SIGNER.sign(text.encode()))}"


OTHER = signed({"typ": TYP, "alg": "EdDSA"})
BOTH = pytest.mark.parametrize("token", [sign(SAID, SIGNER, TYP), OTHER], ids=["ours", "in other words"])


@BOTH
def test_a_statement_of_either_form_is_read(token: str) -> None:
    assert jws.verify(token, raw_public_key(SIGNER), TYP) == SAID
    for key, typ in ((ROOT, TYP), (SIGNER, "lacre-receipt+jwt")):
        with pytest.raises(errors.InvalidSignature):
            jws.verify(token, raw_public_key(key), typ)


@BOTH
def test_nothing_of_a_statement_may_change(token: str) -> None:
    changed = [
        token[:at] + other + token[at + 1 :]
        for at, character in enumerate(token)
        for other in {"A", "é", ".", "="} - {character}
    ]
    for bent in [*changed, *(token[:end] for end in range(len(token)))]:
        with pytest.raises(errors.LacreError):
            jws.verify(bent, raw_public_key(SIGNER), TYP)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff"])
def test_payloads_that_say_nothing(payload: bytes) -> None:
    for header in ({"alg": "EdDSA", "typ": TYP}, {"typ": TYP, "alg": "EdDSA"}):
        with pytest.raises(errors.LacreError):
            jws.verify(signed(header, payload), raw_public_key(SIGNER), TYP)
