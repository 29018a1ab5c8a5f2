"""Signed checkpoints, and the proof that comes with an answer: kept, read back, and held against what was sent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidAudit, InvalidMessage, InvalidSignature, LacreError, MessageTooLarge
from lacre.evidence import audit_proof, checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key
from parts.bent import flipped

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = raw_public_key(KEY)
ORIGIN = "gateway.example.com/audit/g1"
ENTRY = json.dumps({"kind": "intent", "enc": "abc", "subject": "alice"}).encode()


CHECKPOINT = Checkpoint(ORIGIN, 20852163, bytes(range(32, 64)))
NOTE = CHECKPOINT.sign(KEY, checkpoints.key_id(ORIGIN, PUBLIC))


def test_the_form() -> None:
    lines = NOTE.decode().split("\n")
    assert lines[:4] == [ORIGIN, "20852163", base64.b64encode(bytes(range(32, 64))).decode(), ""]
    assert lines[4].startswith(f"— {ORIGIN} ") and lines[5:] == [""]
    assert checkpoints.verify(NOTE, PUBLIC) == CHECKPOINT


def test_signatures_of_witnesses_are_passed_over() -> None:
    witness = b"\xe2\x80\x94 witness.example " + base64.b64encode(bytes(80)) + b"\n"
    assert checkpoints.verify(NOTE + witness, PUBLIC) == CHECKPOINT
    with pytest.raises(InvalidSignature, match="not signed by the expected key"):
        checkpoints.verify(CHECKPOINT.text() + b"\n" + witness, PUBLIC)


def test_extension_lines_are_signed_too() -> None:
    text = CHECKPOINT.text() + b"an extension\n"
    signature = base64.b64encode(checkpoints.key_id(ORIGIN, PUBLIC) + KEY.sign(text)).decode()
    assert checkpoints.verify(text + f"\n— {ORIGIN} {signature}\n".encode(), PUBLIC) == CHECKPOINT
    with pytest.raises(InvalidSignature):
        checkpoints.verify(text.replace(b"an ", b"no ") + f"\n— {ORIGIN} {signature}\n".encode(), PUBLIC)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((b"20852163", size) for size in (b"20852164", b"020852163", b"-1", "٢".encode(), b"2" * 30)),
        *((b"/g1\n208", line) for line in (b"/g2\n208", b"/g1 \n208", b"/g1\r\n208")),
        (b"\n\n", b"\n"), (b"\n\n", b"\n\n\n"), (b"ICEi", b"ICEj"), (b"ICEi", b"ICEi\n\x01"),
        ("—".encode(), b"-"), ("—".encode(), b"\xff"),
    ],
)  # fmt: skip
def test_any_other_note_is_refused(old: bytes, new: bytes) -> None:
    assert old in NOTE
    with pytest.raises((InvalidMessage, InvalidSignature)):
        checkpoints.verify(NOTE.replace(old, new, 1), PUBLIC)


def test_a_note_of_another_key_or_too_long() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(InvalidSignature):
        checkpoints.verify(NOTE, raw_public_key(other))
    with pytest.raises(InvalidSignature, match="does not hold"):  # it takes the id of the key that is expected
        checkpoints.verify(CHECKPOINT.sign(other, checkpoints.key_id(ORIGIN, PUBLIC)), PUBLIC)
    with pytest.raises(MessageTooLarge):
        checkpoints.verify(NOTE + NOTE * 200, PUBLIC)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_note_makes_anything_but_our_errors(data: bytes) -> None:
    for note in (data, NOTE + data, data + NOTE, NOTE[: len(data)] + data):
        with contextlib.suppress(LacreError):
            assert checkpoints.verify(note, PUBLIC) == CHECKPOINT


@given(st.integers(0, len(NOTE) * 8 - 1))
def test_every_bit_of_a_note_counts(bit: int) -> None:
    with pytest.raises(LacreError):
        checkpoints.verify(flipped(NOTE, bit // 8, bit % 8), PUBLIC)


GOOGLES = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
NEUMANNS = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"


@pytest.mark.parametrize("published", [GOOGLES, NEUMANNS])
def test_keys_that_others_published(published: str) -> None:
    """The key id is the one that other implementations of signed notes make."""
    assert checkpoints.verifier_key(*checkpoints.parse_verifier_key(published)) == published


@pytest.mark.parametrize("text", ["", "a", "a+b", "a+00000000+AAAA", f"{GOOGLES[:24]}BAAA", GOOGLES.replace("0ae", "0af")])
def test_no_verifier_key(text: str) -> None:
    with pytest.raises(InvalidMessage):
        checkpoints.parse_verifier_key(text)


def test_a_note_that_others_signed() -> None:
    """From the documentation of Go's `note` package: a text that is no checkpoint, so its signature is held against it here."""
    text = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    _, key = checkpoints.parse_verifier_key(NEUMANNS)
    line = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    checkpoints.Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(line)[4:], text)
    with pytest.raises(InvalidMessage):
        checkpoints.verify(text + f"\n— PeterNeumann {line}\n".encode(), key)


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


@pytest.mark.parametrize(
    ("header", "expected", "told"),
    [
        (PROOF.header(), {"enc": "abd"}, "another request"),
        *((PROOF.header(), {name: value}, f"another {name}") for name, value in (
            ("subject", "bob"), ("pool", "default"), ("kind", None),
        )),
        ("", {}, "has no proof that it was recorded"),
        ("x" * (audit_proof.MAX_HEADER + 1), {}, "malformed"),
        *((PROOF.header().replace(old, new, 1), {}, "malformed") for old, new in (
            ("index=3", "index=03"), ("index=3, ", ""), ("entry=:", "entry="), ("path=:", "path=:AAAA"), (":, path", ", path"),
            ("=:", '="'),
        )),
    ],
)  # fmt: skip
def test_a_header_that_is_none_or_says_something_else(header: str, expected: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidAudit, match=told):
        audit_proof.of_answer(header, PUBLIC, expected)


def spoiled(**members: object) -> AuditProof:
    return dataclasses.replace(PROOF, **members)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "proof",
    [
        spoiled(entry=ENTRY.replace(b"alice", b"mallo")), spoiled(index=2), spoiled(path=PROOF.path[:-1]),
        spoiled(path=(*PROOF.path, bytes(32))), spoiled(checkpoint=PROOF.checkpoint.replace(b"\n7\n", b"\n8\n")),
        proof_of(ENTRY, key=Ed25519PrivateKey.generate()), proof_of(b"not JSON"), proof_of(b"[1]"),
    ],
    ids=["entry", "index", "a shorter path", "a longer path", "checkpoint", "another key", "not JSON", "no object"],
)  # fmt: skip
def test_what_is_not_proved(proof: AuditProof) -> None:
    with pytest.raises(InvalidAudit):
        audit_proof.of_answer(proof.header(), PUBLIC, {"enc": "abc"})


def test_a_file_that_is_too_long() -> None:
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
        *((token, {}) for token in (jwt_of({"sub": 7}), jwt_of([1]), "opaque", "a.b.c", "a.é.c")),
    ],
)
def test_whom_a_token_names(token: str, expected: dict[str, str]) -> None:
    assert audit_proof.speaks_for(token) == expected
