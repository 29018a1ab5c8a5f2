"""The gateway's own audit log, which it must prove to have kept with every answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner
from hostile.attacks import Verdict, attack
from hostile.shapes import Caller, bent, recorded
from lacre.errors import InvalidAudit
from lacre_gateway.audit import series
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import LogLink, encode
from lacre_gateway.audit.feed import read
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome, rotated
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


AUDITED = "an auditor walks all linked logs, whatever key signed them: each begins with the end of the one before"


async def two_logs(folder: Path) -> None:
    log = opened(folder)
    for number in range(3):
        log.append(intent(number))
        await log.append(outcome(number))
    await rotated(log)
    await log.append(intent(9))
    await log.append(outcome(9))
    await log.close()


def audited(folder: Path) -> None:
    """As `lacre audit verify`. Raises Wrong."""
    wrong = verify(folder, PUBLIC).wrong
    if wrong is not None:
        raise wrong


@attack("link an audit log to another one than it continues", "gateway", AUDITED, Wrong)
async def test_link(tmp_path: Path, verdict: Verdict) -> None:
    """With the gateway's own key: a log that never was, and a true link to it."""
    await two_logs(tmp_path / "audit")
    await two_logs(tmp_path / "other")
    audited(tmp_path / "audit")
    other = LogReader(tmp_path / "other", PUBLIC).note.decode()
    for checkpoint in (other, LogReader(tmp_path / "audit", PUBLIC).note.decode().replace("a", "b"), ""):
        shutil.rmtree(tmp_path / "audit/log-2")
        store = Store(tmp_path / "audit/log-2", KEY, f"{ORIGIN}/2")
        store.commit(encode(LogLink(time=1.0, checkpoint=checkpoint, open=0)))
        store.published(store.publication(()).write())
        store.close()
        with verdict.refused():
            audited(tmp_path / "audit")


@attack("erase an old audit log without a record, or with its checkpoint", "gateway",
        "an auditor accepts an erasure only if a later log records it, and its checkpoint remains", Wrong)  # fmt: skip
async def test_erased_log(tmp_path: Path, verdict: Verdict) -> None:
    for name, told in (("secret", False), ("whole", True)):
        folder = tmp_path / name
        await two_logs(folder)
        erased(folder, 1, told=told)
        if told:
            audited(folder)
            (folder / "checkpoint").unlink()
        with verdict.refused():
            audited(folder)


@attack("make an export skip entries", "gateway",
        "an export compares all entries with the signed tree, and passes over a log only if its erasure is recorded",
        Wrong)  # fmt: skip
async def test_skipping_export(tmp_path: Path, verdict: Verdict) -> None:
    await two_logs(tmp_path / "audit")
    assert len([*read(tmp_path / "audit", PUBLIC)]) == 13
    (tmp_path / "audit" / series.PROOF).write_text(LogReader(tmp_path / "audit", PUBLIC).proof(0).text())
    with verdict.refused():
        list(read(tmp_path / "audit", PUBLIC))
