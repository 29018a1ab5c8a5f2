"""nats-server's accounts: the walls between the roles, and the few doors in them.

Rules:
- The streams and buckets are in one account, with the provisioner alone. The gateways share another, and the workers of
  each pool have their own; who looks after the servers is in the servers' own. What is not named here passes no wall.
- Why permissions are not enough: NATS checks what a client publishes to, and not the subject that it asks the answer to go
  to. Inside one account JetStream writes its answers wherever the asker says, with the server's own authority: a worker that
  may read nothing but its own bucket could put a message of its making there, and have it sent as a manifest, as another
  pool's work or as a call of JetStream's API. From another account, an answer comes back to the account that asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lacre.errors import SettingsError
from lacre_fabric import subjects
from lacre_fabric.roles import (
    BUDGETS,
    FABRIC,
    GATEWAYS,
    MAX_DELIVERIES,
    READ_MANIFEST,
    REVOCATIONS,
    SYSTEM,
    TOLD_BY_WORKERS,
    TOLD_TO_WORKERS,
    Role,
    gateway_services,
    worker_services,
    workers_account,
)

Entry = dict[str, Any]
_OWN_API = "$JS.API"


def accounts(roles: Sequence[Role]) -> Entry:
    """The `accounts` block of nats-server's configuration, for every pool that a role names. Raises SettingsError."""
    names = [role.credential.name for role in roles]
    if len(set(names)) != len(names):
        raise SettingsError("two roles have a credential of the same name")
    pools = sorted({pool for role in roles for pool in role.pools})
    found = {FABRIC: _fabric(pools), GATEWAYS: _gateways(pools)} | {workers_account(pool): _workers(pool) for pool in pools}
    if any(role.account == SYSTEM for role in roles):
        found[SYSTEM] = {}
    return {name: {"users": [role.user() for role in roles if role.account == name], **entry} for name, entry in found.items()}


def _fabric(pools: Sequence[str]) -> Entry:
    every = [GATEWAYS, *map(workers_account, pools)]
    services = [_service(READ_MANIFEST, every), *(_service(subject, [GATEWAYS]) for subject in (*REVOCATIONS, *BUDGETS))]
    for pool in pools:
        services += [_service(subject, [GATEWAYS]) for subject in gateway_services(pool)]
        services += [_service(subject, [workers_account(pool)]) for subject in worker_services(pool)]
    return {
        "jetstream": "enabled",
        "mappings": {f"{subjects.API}.>": f"{_OWN_API}.>"},  # so that the provisioner finds it where everybody does
        "exports": [*services, {"stream": MAX_DELIVERIES, "accounts": [GATEWAYS]}],
        "imports": [_heard(workers_account(pool), f"presence.{pool}.*") for pool in pools],
    }


def _gateways(pools: Sequence[str]) -> Entry:
    asked = (service for pool in pools for service in gateway_services(pool))
    return {
        "exports": [
            {"stream": f"{kind}.{pool}.*", "accounts": [workers_account(pool)]} for pool in pools for kind in TOLD_TO_WORKERS
        ],
        "imports": [
            *_asked([READ_MANIFEST, *REVOCATIONS, *BUDGETS, *asked]),
            _heard(FABRIC, MAX_DELIVERIES),
            *(_heard(workers_account(pool), f"{kind}.{pool}.>") for pool in pools for kind in TOLD_BY_WORKERS),
        ],
    }


def _workers(pool: str) -> Entry:
    return {
        "exports": [{"stream": f"{kind}.{pool}.>", "accounts": [GATEWAYS, FABRIC]} for kind in TOLD_BY_WORKERS],
        "imports": [
            *_asked([READ_MANIFEST, *worker_services(pool)]),
            *(_heard(GATEWAYS, f"{kind}.{pool}.*") for kind in TOLD_TO_WORKERS),
        ],
    }


def _service(subject: str, asked_by: Sequence[str]) -> Entry:
    # A pull is answered by a message or by a status, and more than once where both meet.
    many = {"response_type": "stream"} if ".MSG.NEXT." in subject else {}
    return {"service": _real(subject), "accounts": list(asked_by), **many}


def _asked(services: Iterable[str]) -> list[Entry]:
    return [{"service": {"account": FABRIC, "subject": _real(subject)}, "to": subject} for subject in services]


def _heard(account: str, subject: str) -> Entry:
    return {"stream": {"account": account, "subject": subject}}


def _real(subject: str) -> str:
    """The subject as the account of the streams has it."""
    return subject.replace(f"{subjects.API}.", f"{_OWN_API}.", 1)
