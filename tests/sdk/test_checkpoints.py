"""Signed checkpoints: the form, the key's name, and what is no checkpoint."""

from __future__ import annotations

import base64
import contextlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidMessage, InvalidSignature, LacreError, MessageTooLarge
from lacre.evidence import checkpoints
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = raw_public_key(KEY)
ORIGIN = "gateway.example.com/audit/g1"
CHECKPOINT = Checkpoint(ORIGIN, 20852163, bytes(range(32, 64)))
NOTE = CHECKPOINT.sign(KEY, checkpoints.key_id(ORIGIN, PUBLIC))


def test_the_form() -> None:
    lines = NOTE.decode().split("\n")
    assert lines[:4] == [ORIGIN, "20852163", base64.b64encode(bytes(range(32, 64))).decode(), ""]
    assert lines[4].startswith(f"— {ORIGIN} ") and lines[5:] == [""]
    assert checkpoints.verify(NOTE, PUBLIC) == CHECKPOINT


@pytest.mark.parametrize(
    "published",
    [
        "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8",
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ],
)
def test_keys_that_others_published(published: str) -> None:
    """The key id is the one that other implementations of signed notes make."""
    name, key = checkpoints.parse_verifier_key(published)
    assert checkpoints.verifier_key(name, key) == published


def test_a_note_that_others_signed() -> None:
    """From the documentation of Go's `note` package: a text that is no checkpoint, so its signature is held against it here."""
    text = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    _, key = checkpoints.parse_verifier_key("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    line = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    checkpoints.Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(line)[4:], text)
    with pytest.raises(InvalidMessage):
        checkpoints.verify(text + f"\n— PeterNeumann {line}\n".encode(), key)


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
        (b"20852163", b"20852164"),
        (b"20852163", b"020852163"),
        (b"20852163", b"-1"),
        (b"20852163", "٢".encode()),
        (b"20852163", b"2" * 30),
        (b"/g1\n208", b"/g2\n208"),
        (b"/g1\n208", b"/g1 \n208"),
        (b"/g1\n208", b"/g1\r\n208"),
        (b"\n\n", b"\n"),
        (b"\n\n", b"\n\n\n"),
        (b"ICEi", b"ICEj"),
        (b"ICEi", b"ICEi\n\x01"),
        ("—".encode(), b"-"),
        ("—".encode(), b"\xff"),
    ],
)
def test_any_other_note_is_refused(old: bytes, new: bytes) -> None:
    assert old in NOTE
    with pytest.raises((InvalidMessage, InvalidSignature)):
        checkpoints.verify(NOTE.replace(old, new, 1), PUBLIC)


def test_other_keys() -> None:
    with pytest.raises(InvalidSignature):
        checkpoints.verify(NOTE, raw_public_key(Ed25519PrivateKey.generate()))
    other = Ed25519PrivateKey.generate()  # which takes the id of the key that is expected
    with pytest.raises(InvalidSignature, match="does not hold"):
        checkpoints.verify(CHECKPOINT.sign(other, checkpoints.key_id(ORIGIN, PUBLIC)), PUBLIC)


def test_too_long() -> None:
    with pytest.raises(MessageTooLarge):
        checkpoints.verify(NOTE + NOTE * 200, PUBLIC)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_nothing_else_escapes(data: bytes) -> None:
    for note in (data, NOTE + data, data + NOTE, NOTE[: len(data)] + data):
        with contextlib.suppress(LacreError):
            assert checkpoints.verify(note, PUBLIC) == CHECKPOINT


@given(st.integers(0, len(NOTE) * 8 - 1))
def test_every_bit_counts(bit: int) -> None:
    spoiled = bytearray(NOTE)
    spoiled[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LacreError):
        checkpoints.verify(bytes(spoiled), PUBLIC)


OTHER_ID = "sum.golang.org+033de0af+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"


@pytest.mark.parametrize("text", ["", "a", "a+b", "a+00000000+AAAA", "sum.golang.org+033de0ae+BAAA", OTHER_ID])
def test_no_verifier_key(text: str) -> None:
    with pytest.raises(InvalidMessage):
        checkpoints.parse_verifier_key(text)
