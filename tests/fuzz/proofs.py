"""Targets of the audit log's proofs: what a gateway says beside an answer, and what a client may keep and read again."""

from __future__ import annotations

import base64
from typing import Final

from fuzz.statements import SIGNER, text
from fuzz.target import Script, Target
from lacre.errors import InvalidAudit, InvalidMessage, InvalidSignature, MessageTooLarge
from lacre.evidence import audit_proof, checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key

ORIGIN: Final = "lacre.example/log"
PUBLIC: Final = raw_public_key(SIGNER)
KEY_ID: Final = checkpoints.key_id(ORIGIN, PUBLIC)
EXPECTED: Final = {"pool": "default"}


def proven(entry: bytes) -> AuditProof:
    """The proof of an entry that is the only one in its log."""
    note = Checkpoint(ORIGIN, 1, merkle.leaf_hash(entry)).sign(SIGNER, KEY_ID)
    return AuditProof(entry, 0, (), note)


def audit_header(data: bytes) -> AuditProof:
    """With the first byte 0 any header; otherwise an entry that is proven, and what is written behind its header."""
    if data[:1] == b"\x00":
        return audit_proof.of_answer(text(data[1:]), [PUBLIC], EXPECTED)
    script = Script(data[1:])
    return audit_proof.of_answer(proven(script.text()).header() + text(script.rest()), [PUBLIC], EXPECTED)


def proof_written_alike(_data: bytes, proof: AuditProof) -> None:
    assert AuditProof.parse_header(proof.header()) == proof
    assert AuditProof.parse(proof.text()) == proof
    assert EXPECTED.items() <= proof.members.items()


def audit_file(data: bytes) -> AuditProof:
    return AuditProof.parse(text(data))


def file_can_be_judged(_data: bytes, proof: AuditProof) -> None:
    """Nothing in it is trusted yet: it verifies or is an InvalidAudit."""
    try:
        proof.verify(PUBLIC)
    except InvalidAudit:
        return
    assert AuditProof.parse(proof.text()) == proof


def checkpoint(data: bytes) -> Checkpoint:
    """With the first byte 0 any note; otherwise its text, which is signed as it is."""
    if data[:1] == b"\x00":
        return checkpoints.verify(data[1:], PUBLIC)
    body = data[1:]
    signature = base64.b64encode(KEY_ID + SIGNER.sign(body + b"\n")).decode()
    return checkpoints.verify(body + f"\n\n— {ORIGIN} {signature}\n".encode(), PUBLIC)


def checkpoint_written_alike(_data: bytes, found: Checkpoint) -> None:
    assert checkpoints.verify(found.sign(SIGNER, checkpoints.key_id(found.origin, PUBLIC)), PUBLIC) == found


TARGETS: Final = (
    Target("audit_header", audit_header, (InvalidAudit,), proof_written_alike, json=True),
    Target("audit_file", audit_file, (InvalidMessage, MessageTooLarge), file_can_be_judged),
    Target("checkpoint", checkpoint, (InvalidMessage, MessageTooLarge, InvalidSignature), checkpoint_written_alike),
)
