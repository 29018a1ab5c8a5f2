"""Entries for audit logs, and logs to put them in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose.jws import raw_public_key
from lacre_fabric.logs import make_log
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import series
from lacre_gateway.audit.entries import Event, Intent, Outcome, encode
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.audit.store import Store
from parts.waiting import until

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = raw_public_key(KEY)
ORIGIN = "gateway.example.com/audit/g1"


def intent(number: int, **changes: Any) -> Intent:
    standard: dict[str, Any] = {
        "request_id": f"{number:032x}", "time": 1.5 + number, "subject": "alice", "tenant": "acme", "issuer": "i", "jti": None,
        "address": "192.0.2.1", "pool": "default", "model": "m", "action": "chat", "shape": "none", "kem": "X25519",
        "max_tokens": 1, "sealed_bytes": 2, "enc": "ab", "groups": ("a",), "scopes": ("chat",), "plan": None,
        "decision": "allow", "policies": ("p",), "policy_set": "00", "entities": "00", "reserved_prompt_tokens": 1,
        "reserved_tokens": 1,
    }  # fmt: skip
    return Intent(**{**standard, **changes})


def outcome(number: int, **changes: Any) -> Outcome:
    standard: dict[str, Any] = {
        "request_id": f"{number:032x}", "time": 2.5 + number, "outcome": "answered", "status": 200, "unreceipted": False,
        "receipt": "00", "refused_receipt": None, "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 2,
        "duration": 1.0,
    }  # fmt: skip
    return Outcome(**{**standard, **changes})


def opened(folder: Path, key: Ed25519PrivateKey = KEY, said: io.StringIO | None = None, under_way: int = 1) -> AuditLog:
    return AuditLog(folder, key, ORIGIN, log=make_log(said or io.StringIO()), under_way=lambda: under_way)


async def written(folder: Path, requests: int, key: Ed25519PrivateKey = KEY) -> None:
    """A log of so many requests; the first entry says that it was started, the last that it was stopped."""
    log = opened(folder, key)
    for number in range(requests):
        log.append(intent(number))
        await log.append(outcome(number)) if number % 50 == 0 else log.append(outcome(number))
    await log.close()


async def rotated(log: AuditLog, actor: str | None = None) -> None:
    before = log.origin
    log.rotate(actor)
    await until(lambda: log.origin != before)


def erased(root: Path, number: int, *, told: bool = True) -> None:
    """As retention does it: first the record in the newest log, then the files."""
    folder = series.place(root, number)
    reader = LogReader(folder, PUBLIC)
    if told:
        store = Store(root, KEY, ORIGIN)
        event = Event(time=9.0, event=kinds.ERASED, target=reader.checkpoint.origin, count=reader.size)
        store.commit(encode(event))
        store.published(store.publication(()).write())
        store.close()
    series.erase(folder, PUBLIC)
