"""nats-server's accounts: they separate the roles, with few openings between them.

Rules:
- One account holds the streams and buckets, with only the provisioner as a user. Each gateway has an account. So have the
  workers of each pool, the inspector and the warden. Only subjects named here pass between accounts.
- A gateway's account reaches only its own pools. Gateways do not share an account: one of them could take all its connections.
- The workers of a pool share their account in every region, because they have the same keys. Permissions keep each to its
  queue.
- Permissions alone are not enough. NATS checks the subject that a client publishes to, but not the subject that it wants the
  answer on. Inside one account JetStream sends its answer to that subject with the server's own authority.
- A worker that may read only its own bucket could then store a forged message there. It could make JetStream send it as a
  manifest, as another pool's work or as a call of JetStream's API. Across accounts, an answer returns only to the account that
  asked.
- Workers import no stream. They subscribe for each request, and nats-server (2.15) crashes if a client subscribes to a stream
  of another account while the server reads new accounts. So an order or an offer to a worker is a service without an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from lacre.errors import SettingsError
from lacre_fabric.nats import subjects
from lacre_fabric.nats.roles import (
    BUDGETS,
    FABRIC,
    GUARD,
    INSPECT,
    INSPECTION,
    MAX_DELIVERIES,
    MAX_PROCESSES,
    MAX_SLOTS,
    READ_MANIFEST,
    REVOCATIONS,
    SYSTEM,
    TOLD_BY_WORKERS,
    TOLD_TO_WORKERS,
    WARDEN,
    Role,
    gateway_account,
    gateway_services,
    worker_services,
    workers_account,
)
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.work import frames

Entry = dict[str, Any]
_OWN_API: Final = "$JS.API"
# A broken connection counts until the server notices, so each process may have twice what it needs.
_OVERLAP: Final = 2
MAX_WORKERS: Final = 64  # of one pool in one region at a time; each has one connection
# Of one process, besides one for each pool's replies: requests, presence, and one for a command
_GATEWAY_CONNECTIONS: Final = 3
_FEW_CONNECTIONS: Final = 32  # for a role of one process or command, or a few at a time
WORKER_SUBSCRIPTIONS: Final = 2 * MAX_SLOTS + 24  # of one worker: two for each request and some more; each takes 1.5 KB
_SUBSCRIPTIONS: Final = 256  # of one connection of any other role, which needs a dozen
WORKER_PAYLOAD: Final = frames.MAX_PAYLOAD + 64 * 1024  # bytes: a frame and its headers, or a presence message
_SMALL_PAYLOAD: Final = 64 * 1024  # bytes: a question to a server
_ASKING: Final = {INSPECTION: INSPECT, WARDEN: GUARD}  # the accounts that ask servers about themselves, and their questions


@dataclass(frozen=True, slots=True)
class AccountLimits:
    """The limits of an account, in nats-server's terms. connections: of all its users on all servers. subscriptions: of one
    connection. payload: bytes of one message with its headers.
    """

    max_connections: int
    max_subscriptions: int
    max_payload: int


def accounts(roles: Sequence[Role], unheard: Collection[str] = ()) -> Entry:
    """The `accounts` block of nats-server's configuration, for every pool and region of the roles. It is the same for the
    servers of all regions. Raises SettingsError.

    unheard: pools to whose workers no other account listens yet (see `operate.account_reload`).
    """
    names = [role.credential.name for role in roles]
    if len(set(names)) != len(names):
        raise SettingsError("two roles have a credential of the same name")
    pools = sorted({pool for role in roles for pool in role.pools})
    regions = sorted({region for role in roles for region in role.regions})
    gateways = _gateways_of(roles)
    found = {FABRIC: _fabric(pools, regions, gateways, unheard)}
    found |= {account: _gateway(served, regions, unheard) for account, served in gateways.items()}
    found |= {workers_account(pool): _workers(pool, regions, _serving(pool, gateways)) for pool in pools}
    asking = {name: asked for name, asked in _ASKING.items() if any(role.account == name for role in roles)}
    if asking:
        found |= {SYSTEM: _system(asking), **{name: _asking(asked) for name, asked in asking.items()}}
    return {
        name: {
            "users": [role.user() for role in roles if role.account == name],
            "limits": asdict(_limits(name, roles)),
            **entry,
        }
        for name, entry in found.items()
    }


def _gateways_of(roles: Sequence[Role]) -> dict[str, list[str]]:
    """The gateways' accounts, each with its pools."""
    found: dict[str, set[str]] = {}
    for role in roles:
        if role.account.startswith(gateway_account("")):
            found.setdefault(role.account, set()).update(role.pools)
    return {account: sorted(pools) for account, pools in found.items()}


def _serving(pool: str, gateways: Mapping[str, Sequence[str]]) -> list[str]:
    return [account for account, pools in gateways.items() if pool in pools]


def _limits(account: str, roles: Sequence[Role]) -> AccountLimits:
    """Limits grow with the roles that share the account."""
    if account == FABRIC:
        return AccountLimits(_FEW_CONNECTIONS, _SUBSCRIPTIONS, MAX_PAYLOAD)
    if account.startswith(gateway_account("")):
        each = (_GATEWAY_CONNECTIONS + len(role.pools) for role in roles if role.account == account)
        return AccountLimits(_OVERLAP * MAX_PROCESSES * sum(each), _SUBSCRIPTIONS, MAX_PAYLOAD)
    if account == SYSTEM or account in _ASKING:
        return AccountLimits(_FEW_CONNECTIONS, _SUBSCRIPTIONS, _SMALL_PAYLOAD)
    regions = {region for role in roles if role.account == account for region in role.regions}
    return AccountLimits(_OVERLAP * MAX_WORKERS * len(regions), WORKER_SUBSCRIPTIONS, WORKER_PAYLOAD)


def _system(asking: Mapping[str, Sequence[str]]) -> Entry:
    subjects_asked = dict.fromkeys(subject for asked in asking.values() for subject in asked)
    return {
        "exports": [
            {
                "service": subject,
                "accounts": [name for name, asked in asking.items() if subject in asked],
                "response_type": "stream",
            }
            for subject in subjects_asked
        ]
    }


def _asking(asked: Sequence[str]) -> Entry:
    return {"imports": [{"service": {"account": SYSTEM, "subject": subject}} for subject in asked]}


def _fabric(
    pools: Sequence[str], regions: Sequence[str], gateways: Mapping[str, Sequence[str]], unheard: Collection[str]
) -> Entry:
    every = [*gateways, *map(workers_account, pools)]
    services = [_service(READ_MANIFEST, every), *(_service(subject, [*gateways]) for subject in (*REVOCATIONS, *BUDGETS))]
    for pool in pools:
        services += [_service(subject, _serving(pool, gateways)) for subject in _of_gateways(pool, regions)]
        services += [_service(subject, [workers_account(pool)]) for subject in _of_workers(pool, regions)]
    return {
        "jetstream": "enabled",
        "mappings": {f"{subjects.API}.>": f"{_OWN_API}.>"},  # so that the provisioner finds it at the usual subject
        "exports": [*services, {"stream": MAX_DELIVERIES, "accounts": [*gateways]}],
        "imports": [_heard(workers_account(pool), f"presence.{pool}.*.*") for pool in pools if pool not in unheard],
    }


def _gateway(pools: Sequence[str], regions: Sequence[str], unheard: Collection[str]) -> Entry:
    asked = (service for pool in pools for service in _of_gateways(pool, regions))
    heard = [pool for pool in pools if pool not in unheard]
    return {
        "imports": [
            *_asked([READ_MANIFEST, *REVOCATIONS, *BUDGETS, *asked]),
            *(_ordered(pool, f"{kind}.{pool}.*") for pool in pools for kind in TOLD_TO_WORKERS),
            *(_ordered(pool, subjects.offers(pool, "*", "*")) for pool in pools),
            _heard(FABRIC, MAX_DELIVERIES),
            *(_heard(workers_account(pool), f"{kind}.{pool}.*.*") for pool in heard for kind in TOLD_BY_WORKERS),
        ],
    }


def _workers(pool: str, regions: Sequence[str], gateways: Sequence[str]) -> Entry:
    heard: list[Entry] = [{"stream": f"{kind}.{pool}.*.*", "accounts": [*gateways, FABRIC]} for kind in TOLD_BY_WORKERS]
    told = [*(f"{kind}.{pool}.*" for kind in TOLD_TO_WORKERS), subjects.offers(pool, "*", "*")]
    taken: list[Entry] = [{"service": subject, "accounts": [*gateways]} for subject in told]
    return {"exports": [*heard, *taken], "imports": _asked([READ_MANIFEST, *_of_workers(pool, regions)])}


def _of_gateways(pool: str, regions: Sequence[str]) -> list[str]:
    return [service for region in regions for service in gateway_services(pool, region)]


def _of_workers(pool: str, regions: Sequence[str]) -> list[str]:
    """Each once: all regions share the same claims."""
    return list(dict.fromkeys(service for region in regions for service in worker_services(pool, region)))


def _service(subject: str, asked_by: Sequence[str]) -> Entry:
    # A pull gets a message or a status as its answer, and sometimes both.
    many = {"response_type": "stream"} if ".MSG.NEXT." in subject else {}
    return {"service": _real(subject), "accounts": list(asked_by), **many}


def _asked(services: Iterable[str]) -> list[Entry]:
    return [{"service": {"account": FABRIC, "subject": _real(subject)}, "to": subject} for subject in services]


def _ordered(pool: str, subject: str) -> Entry:
    return {"service": {"account": workers_account(pool), "subject": subject}}


def _heard(account: str, subject: str) -> Entry:
    return {"stream": {"account": account, "subject": subject}}


def _real(subject: str) -> str:
    """The subject as the streams' account names it."""
    return subject.replace(f"{subjects.API}.", f"{_OWN_API}.", 1)
