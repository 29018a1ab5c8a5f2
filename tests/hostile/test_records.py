"""The gateway's own audit log, which it must prove to have kept with every answer."""

from __future__ import annotations

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner
from hostile.attacks import Verdict, attack
from hostile.shapes import Caller, bent, recorded
from lacre.errors import InvalidAudit
from parts.keys import OTHER_MODEL
from parts.stage import Stage

PROVED = "the caller accepts an answer only with a proof that the gateway recorded the request"
OTHERS = (
    {"enc": "A" * 43}, {"model": OTHER_MODEL}, {"action": "embed"}, {"max_tokens": 1}, {"pool": "other"}, {"shape": "none"},
    {"kem": "X25519"}, {"decision": "deny"}, {"kind": "outcome"},
)  # fmt: skip

test_none = recorded("answer without recording it", PROVED, InvalidAudit, lambda _entry: None)
test_another = recorded("record another request than was sent", PROVED, InvalidAudit,
    *(lambda entry, other=other: entry | other for other in OTHERS))  # fmt: skip
test_key = bent("log_key", "sign the log's checkpoint with a key that the manifest does not name", PROVED, InvalidAudit,
    Ed25519PrivateKey.generate(), calls=1)  # fmt: skip


@attack("record a request under another caller's name", "gateway", PROVED, InvalidAudit)
async def test_name(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    token = jwt.encode({"sub": "alice", "iss": "https://issuer.example"}, "k" * 32)
    gateway.recorded = lambda entry: entry | {"subject": "mallory"}
    with verdict.refused():
        await stage.client(gateway, token).chat(stage.prompt)


@attack("show its callers one log, and its auditors another", "gateway",
        "nothing at once: two signed checkpoints prove it to anyone who compares them",
        gain="a second log, until somebody compares")  # fmt: skip
async def test_two_logs(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    """Each caller of these tests is shown a log that holds nothing but its own request."""
    await stage.worker()
    for _ in range(2):
        assert (await caller.chat(stage.prompt)).text == stage.prompt
