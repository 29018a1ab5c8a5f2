"""The proof that comes with an answer: kept, read back, and held against what was sent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidAudit, LacreError
from lacre.evidence import audit_proof, checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = raw_public_key(KEY)
ORIGIN = "gateway.example.com/audit/g1"
ENTRY = json.dumps({"kind": "intent", "enc": "abc", "subject": "alice"}).encode()


def proof_of(entry: bytes, others: int = 6, index: int = 3, key: Ed25519PrivateKey = KEY) -> AuditProof:
    nodes, frontier = {}, merkle.Frontier()
    for number in range(others + 1):
        for level, place, node in frontier.grow(merkle.leaf_hash(entry if number == index else b"%d" % number)):
            nodes[level, place] = node
    path = merkle.inclusion_proof(index, frontier.size, lambda level, place: nodes[level, place])
    note = Checkpoint(ORIGIN, frontier.size, frontier.root()).sign(key, checkpoints.key_id(ORIGIN, raw_public_key(key)))
    return AuditProof(entry, index, path, note)


PROOF = proof_of(ENTRY)


def test_header_and_file_hold_the_same() -> None:
    assert AuditProof.parse_header(PROOF.header()) == PROOF
    assert AuditProof.parse(PROOF.text()) == PROOF
    assert PROOF.text().startswith("c2sp.org/tlog-proof@v1\nextra ")
    assert audit_proof.of_answer(PROOF.header(), PUBLIC, {"kind": "intent", "enc": "abc", "subject": "alice"}) == PROOF


def test_a_log_of_one_entry() -> None:
    alone = proof_of(ENTRY, others=0, index=0)
    assert "path=::" in alone.header()
    assert AuditProof.parse_header(alone.header()) == alone == AuditProof.parse(alone.text())
    assert alone.verify(PUBLIC).size == 1


@pytest.mark.parametrize("entry", [b'{"model":"larger","model":"m"}', b'{"model":"m","x":{"a":1,"a":2}}', b"[]", b"{"])
def test_an_entry_with_two_readings(entry: bytes) -> None:
    with pytest.raises(InvalidAudit):
        _ = AuditProof(entry, 0, (), b"").members


def test_members_of_the_future_are_passed_over() -> None:
    assert AuditProof.parse_header(PROOF.header() + ', witness=:AAAA:, more="x"') == PROOF


@pytest.mark.parametrize("expected", [{"enc": "abd"}, {"subject": "bob"}, {"pool": "default"}, {"kind": None}])
def test_an_entry_that_says_something_else(expected: dict[str, object]) -> None:
    name = next(iter(expected))
    with pytest.raises(InvalidAudit, match="another request" if name == "enc" else f"another {name}"):
        audit_proof.of_answer(PROOF.header(), PUBLIC, expected)


def test_none_at_all() -> None:
    with pytest.raises(InvalidAudit, match="has no proof that it was recorded"):
        audit_proof.of_answer("", PUBLIC, {})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda proof: dataclasses.replace(proof, entry=proof.entry.replace(b"alice", b"mallo")),
        lambda proof: dataclasses.replace(proof, index=2),
        lambda proof: dataclasses.replace(proof, path=proof.path[:-1]),
        lambda proof: dataclasses.replace(proof, path=(*proof.path, bytes(32))),
        lambda proof: dataclasses.replace(proof, checkpoint=proof.checkpoint.replace(b"\n7\n", b"\n8\n")),
        lambda _: proof_of(ENTRY, key=Ed25519PrivateKey.generate()),
        lambda _: proof_of(b"not JSON"),
        lambda _: proof_of(b"[1]"),
    ],
)
def test_what_is_not_proved(spoil: object) -> None:
    with pytest.raises(InvalidAudit):
        audit_proof.of_answer(spoil(PROOF).header(), PUBLIC, {"enc": "abc"})  # type: ignore[operator]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("index=3", "index=03"),
        ("index=3, ", ""),
        ("entry=:", "entry="),
        ("path=:", "path=:AAAA"),
        (":, path", ", path"),
        ("=:", '="'),
    ],
)
def test_malformed_headers(old: str, new: str) -> None:
    assert old in PROOF.header()
    with pytest.raises(InvalidAudit, match="malformed"):
        audit_proof.of_answer(PROOF.header().replace(old, new, 1), PUBLIC, {})


def test_too_long() -> None:
    with pytest.raises(InvalidAudit, match="malformed"):
        audit_proof.of_answer("x" * (audit_proof.MAX_HEADER + 1), PUBLIC, {})
    with pytest.raises(LacreError):
        AuditProof.parse("x" * 200_000)


def test_the_largest_fits() -> None:
    """An entry as large as the gateway makes one, the longest path, and a checkpoint with the longest origin."""
    note = Checkpoint("o" * 255, merkle.MAX_LEAVES, bytes(32)).sign(KEY, bytes(4))
    largest = AuditProof(bytes(audit_proof.MAX_INTENT), merkle.MAX_LEAVES - 1, (bytes(32),) * merkle.MAX_PATH, note)
    assert len(largest.header()) <= audit_proof.MAX_HEADER
    assert AuditProof.parse_header(largest.header()) == largest


@given(st.text(max_size=300), st.integers(0, 500))
def test_nothing_else_escapes(junk: str, at: int) -> None:
    for text, parse in ((PROOF.header(), AuditProof.parse_header), (PROOF.text(), AuditProof.parse)):
        for bent in (junk, text[:at] + junk + text[at:], text[:at] + junk):
            with contextlib.suppress(LacreError):
                parse(bent).verify(PUBLIC)


def jwt_of(claims: object) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (jwt_of({"sub": "alice", "iss": "https://issuer.example"}), {"subject": "alice", "issuer": "https://issuer.example"}),
        (jwt_of({"sub": 7}), {}),
        (jwt_of([1]), {}),
        ("opaque", {}),
        ("a.b.c", {}),
        ("a.é.c", {}),
    ],
)
def test_whom_a_token_names(token: str, expected: dict[str, str]) -> None:
    assert audit_proof.speaks_for(token) == expected
