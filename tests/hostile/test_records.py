"""The gateway's own audit log, which it must prove to have kept with every answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from lacre.errors import InvalidAudit
from parts.keys import OTHER_MODEL
from parts.stage import Stage

PROVED = "the caller accepts an answer only with a proof that the gateway recorded the request"

Entry = dict[str, Any]


async def unproved(
    stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, recorded: Callable[[Entry], Entry | None]
) -> None:
    await stage.worker()
    gateway.recorded = recorded
    with verdict.refused():
        await caller.chat(stage.prompt)


@attack("answer without recording it", by="gateway", defence=PROVED, refused=InvalidAudit)
async def test_none(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await unproved(stage, caller, gateway, verdict, lambda _entry: None)


@attack("record another request than was sent", by="gateway", defence=PROVED, refused=InvalidAudit)
@pytest.mark.parametrize(
    "other",
    [
        {"enc": "A" * 43},
        {"model": OTHER_MODEL},
        {"action": "embed"},
        {"max_tokens": 1},
        {"pool": "other"},
        {"shape": "none"},
        {"kem": "X25519"},
        {"decision": "deny"},
        {"kind": "outcome"},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_another(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, other: Entry) -> None:
    await unproved(stage, caller, gateway, verdict, lambda entry: entry | other)


@attack("record a request under another caller's name", by="gateway", defence=PROVED, refused=InvalidAudit)
async def test_name(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    token = jwt.encode({"sub": "alice", "iss": "https://issuer.example"}, "k" * 32)
    gateway.recorded = lambda entry: entry | {"subject": "mallory"}
    with verdict.refused():
        await stage.client(gateway, token).chat(stage.prompt)


@attack(
    "sign the log's checkpoint with a key that the manifest does not name", by="gateway", defence=PROVED, refused=InvalidAudit
)
async def test_key(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.log_key = Ed25519PrivateKey.generate()
    await unproved(stage, caller, gateway, verdict, lambda entry: entry)


@attack(
    "show its callers one log, and its auditors another",
    by="gateway",
    defence="nothing at once: two signed checkpoints prove it to anyone who compares them",
    refused=None,
    gain="a second log, until somebody compares",
)
async def test_two_logs(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    """Each caller of these tests is shown a log that holds nothing but its own request."""
    await stage.worker()
    assert (await caller.chat(stage.prompt)).text == stage.prompt
    assert (await caller.chat(stage.prompt)).text == stage.prompt
