"""Signed statements about files: DSSE envelopes with an Ed25519 key, and in-toto statements in them.

Rules:
- No file, clock or network here: bytes in, bytes out.
- A payload is not parsed before its signature holds.

Sources: DSSE 1.0.2 (protocol.md, envelope.md), in-toto attestation spec v1 (statement.md, envelope.md).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT: Final = "https://in-toto.io/Statement/v1"
PROVENANCE: Final = "https://slsa.dev/provenance/v1"


class AttestationError(Exception):
    """An envelope or a statement does not hold. The text says what is wrong with it."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """What a signature is over: type and payload, each after its length in bytes, so that neither can pass for the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(key: Ed25519PublicKey) -> str:
    """The key's fingerprint, as `ssh-keygen -l` prints it. A hint for people: which keys count, the verifier says."""
    blob = base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    return "SHA256:" + base64.b64encode(sha256(blob).digest()).decode().rstrip("=")


def seal(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """A DSSE envelope of an in-toto statement, as one line of JSON."""
    signature = key.sign(pae(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope).encode() + b"\n"


def open_envelope(envelope: bytes, keys: Iterable[Ed25519PublicKey]) -> bytes:
    """The payload, which one of the keys signed. Raises AttestationError."""
    try:
        members = json.loads(envelope)
        kind, payload = members["payloadType"], base64.b64decode(members["payload"], validate=True)
        signatures = [base64.b64decode(each["sig"], validate=True) for each in members["signatures"]]
    except (ValueError, TypeError, KeyError, binascii.Error) as exc:
        raise AttestationError("the provenance is not a DSSE envelope") from exc
    if kind != PAYLOAD_TYPE:
        raise AttestationError(f"the envelope holds {kind!r}, not an in-toto statement")
    signed = pae(kind, payload)
    if not any(_signed(key, signature, signed) for key in keys for signature in signatures):
        raise AttestationError("no trusted key signed the provenance")
    return payload


def _signed(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def statement(digests: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """An in-toto statement with SLSA provenance. digests: hex SHA-256 of each file by its name."""
    subject = [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)]
    members = {"_type": STATEMENT, "subject": subject, "predicateType": PROVENANCE, "predicate": predicate}
    return json.dumps(members, sort_keys=True).encode()


def read_statement(payload: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The digests and the predicate that `statement` was given. Raises AttestationError."""
    try:
        members = json.loads(payload)
        kinds = (members["_type"], members["predicateType"])
        digests = {each["name"]: each["digest"]["sha256"] for each in members["subject"]}
        predicate = dict(members["predicate"])
    except (ValueError, TypeError, KeyError) as exc:
        raise AttestationError("the payload is not an in-toto statement") from exc
    if kinds != (STATEMENT, PROVENANCE):
        raise AttestationError(f"the statement is of the types {kinds}, not SLSA provenance v1")
    return digests, predicate
