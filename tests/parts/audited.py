"""An audit log of one entry, in memory: what proves to a client that a fake gateway recorded it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import b64u, raw_public_key
from lacre.wire.header import inspect_request

ORIGIN = "test/audit/g1"


def entry(headers: Mapping[str, str], body: bytes, **changes: Any) -> dict[str, Any]:
    """What a gateway records of a request: the members that a client compares."""
    header = inspect_request(body)
    members = {
        "kind": "intent", "subject": "alice", "issuer": "https://issuer.example", "enc": b64u(header.digest),
        "pool": headers["lacre-pool"], "model": headers["lacre-model"], "action": headers["lacre-action"],
        "max_tokens": int(headers["lacre-max-tokens"]), "shape": headers["lacre-shape"], "kem": header.suite.kem.label,
        "sealed_bytes": len(body), "decision": "allow",
    }  # fmt: skip
    return {**members, **changes}


def proof(members: Mapping[str, Any], key: Ed25519PrivateKey) -> AuditProof:
    data = json.dumps(members).encode()
    note = Checkpoint(ORIGIN, 1, merkle.leaf_hash(data)).sign(key, checkpoints.key_id(ORIGIN, raw_public_key(key)))
    return AuditProof(data, 0, (), note)
