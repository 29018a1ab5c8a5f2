"""DSSE envelopes and in-toto statements, from bytes to bytes."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation import AttestationError, key_id, open_envelope, pae, read_statement, seal, statement

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
DIGESTS = {"b.whl": "22" * 32, "a.whl": "11" * 32}
PREDICATE = {"buildDefinition": {"buildType": "urn:example:1"}}


def test_what_is_signed() -> None:
    """The vector of DSSE's protocol.md; a length is of bytes, not of characters."""
    assert pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("é", b"") == "DSSEv1 2 é 0 ".encode()


def test_there_and_back() -> None:
    """A statement has the names of in-toto's and SLSA's specifications."""
    payload = statement(DIGESTS, PREDICATE)
    envelope = seal(payload, KEY)
    assert envelope.count(b"\n") == 1
    assert open_envelope(envelope, [Ed25519PrivateKey.generate().public_key(), KEY.public_key()]) == payload
    assert read_statement(payload) == (DIGESTS, PREDICATE)
    assert json.loads(envelope)["signatures"][0]["keyid"] == key_id(KEY.public_key())
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": DIGESTS[name]}} for name in ("a.whl", "b.whl")],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": PREDICATE,
    }


def test_another_key() -> None:
    with pytest.raises(AttestationError, match="no trusted key"):
        open_envelope(seal(b"{}", KEY), [Ed25519PrivateKey.generate().public_key()])


@pytest.mark.parametrize("member", ["payload", "payloadType"])
def test_another_payload_or_type_under_the_same_signature(member: str) -> None:
    envelope = json.loads(seal(b"{}", KEY))
    envelope[member] = base64.b64encode(b"[]").decode()
    with pytest.raises(AttestationError):
        open_envelope(json.dumps(envelope).encode(), [KEY.public_key()])


def test_another_type_that_the_key_did_sign() -> None:
    """The key may sign other things in envelopes: none of them is provenance."""
    envelope = json.loads(seal(b"{}", KEY))
    envelope["payloadType"] = "text/plain"
    envelope["signatures"][0]["sig"] = base64.b64encode(KEY.sign(pae("text/plain", b"{}"))).decode()
    with pytest.raises(AttestationError, match="not an in-toto statement"):
        open_envelope(json.dumps(envelope).encode(), [KEY.public_key()])


@pytest.mark.parametrize("envelope", [b"", b"[]", b"{}", b"\xff", b'{"payloadType": "x", "payload": "*", "signatures": []}'])
def test_no_envelope(envelope: bytes) -> None:
    with pytest.raises(AttestationError, match="not a DSSE envelope"):
        open_envelope(envelope, [KEY.public_key()])


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b'{"_type": 1, "predicateType": 2, "subject": [], "predicate": {}}'])
def test_no_statement(payload: bytes) -> None:
    with pytest.raises(AttestationError, match="statement"):
        read_statement(payload)
