"""The fabric's roles: each role's credential, and the permissions that nats-server enforces for it.

Rules:
- Every process has its own credential and its own inbox. With the usual `_INBOX.>` a worker of one pool could read answers to
  another.
- Only the provisioner creates streams, consumers and buckets, and writes the manifest.
- Only gateways use revocations: each adds them in its own name and reads all. It can change or remove none.
- A gateway reads all budgets, and writes only its own part: what its leases hold.
- The inspector asks the servers three questions about themselves and nothing else. It has its own account: in the system
  account, an answer could be sent to a subject that servers obey.
- The warden asks the servers how much each client sends, and makes them close connections or read their own configuration
  again. Only the site's operator holds it, because it can close any connection. It also has its own account.
- A worker asks JetStream's shared API nothing: all pools share its queue of questions, which drops them all when full.
- A gateway offers work to any worker of its pools. A worker hears only offers to itself, and only as one of a group
  (`OFFERS_GROUP`): each offer comes to one subscriber, so nobody gets a silent copy.
- A gateway reads only its own replies. A worker uses only its own pool, and only the queue of its own region.
- Permissions alone do not enforce this (see `accounts`): each role also has an account with no more than it needs.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.claims import Members
from lacre_fabric.keys.secret_files import read_secret, write_secret
from lacre_fabric.nats import subjects

FABRIC: Final = "FABRIC"  # the account of the streams, the buckets and the provisioner
READ_MANIFEST: Final = (
    f"{subjects.API}.DIRECT.GET.KV_{subjects.TRUST_BUCKET}.$KV.{subjects.TRUST_BUCKET}.{subjects.MANIFEST_KEY}"
)
REVOCATIONS: Final = (subjects.revocation("*"), subjects.READ_REVOCATIONS)  # gateways' questions about them
# The subjects that gateways read and write for the shared budgets.
BUDGETS: Final = (f"$KV.{subjects.BUDGETS_BUCKET}.>", subjects.READ_BUDGETS)
SYSTEM: Final = "$SYS"  # nats-server's system account: servers report about themselves here
INSPECTION: Final = "INSPECTION"
INSPECT: Final = tuple(f"$SYS.REQ.SERVER.PING.{what}" for what in ("VARZ", "JSZ", "CONNZ"))
CONNECTIONS: Final = INSPECT[2]
WARDEN: Final = "WARDEN"
KICK: Final = subjects.kick("*")
RELOAD: Final = subjects.reload("*")
GUARD: Final = (CONNECTIONS, KICK, RELOAD)  # the warden's questions and orders to servers
MAX_PROCESSES: Final = 16  # of one gateway; beyond it, give another gateway its own credential
MAX_SLOTS: Final = 500  # parallel requests of one worker, whose connection has two subscriptions for each
MAX_DELIVERIES: Final = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"
OFFERS_GROUP: Final = "offers"  # NATS gives each message to one subscriber of a group
TOLD_TO_WORKERS: Final = ("cancel", "credit")  # orders from gateways, as `KIND.POOL.REQUEST`
TOLD_BY_WORKERS: Final = ("reply", "presence")  # `reply.POOL.GATEWAY.REQUEST`, `presence.POOL.REGION.NODE`


@dataclass(frozen=True, slots=True)
class Credential:
    """A name and a password for nats-server, in a 0600 file. `name` is also the role, which inbox subjects contain.

    file: where it was read. A replaced password is read there again (see `login`).
    """

    name: str
    password: str = field(repr=False)
    file: Path | None = field(default=None, repr=False, compare=False)

    @classmethod
    def new(cls, name: str) -> Credential:
        return cls(name, secrets.token_urlsafe(32))

    @classmethod
    def load(cls, path: Path) -> Credential:
        """Raises SettingsError."""
        try:
            members = Members.parse(read_secret(path), "the credential")
            return cls(members.text("name"), members.text("password"), path)
        except InvalidMessage as exc:
            raise SettingsError(f"{path} is not a fabric credential: `lacre up` writes them") from exc

    @classmethod
    def load_or_new(cls, path: Path, name: str) -> Credential:
        if not path.exists():
            cls.new(name).save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        write_secret(path, json.dumps({"name": self.name, "password": self.password}).encode())


@dataclass(frozen=True, slots=True)
class Role:
    """A credential, its account, its pools and regions, and the subjects it may publish and subscribe to."""

    credential: Credential
    account: str
    pools: tuple[str, ...]
    regions: tuple[str, ...]
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def user(self) -> dict[str, Any]:
        """The user's entry in nats-server's configuration."""
        return {
            "user": self.credential.name,
            "password": self.credential.password,
            "permissions": {"publish": list(self.publish), "subscribe": list(self.subscribe)},
        }


def provisioner(credential: Credential) -> Role:
    return Role(credential, FABRIC, (), (), (">",), (">",))


def inspector(credential: Credential) -> Role:
    """Asks servers about their configuration and state, for `lacre fabric check`."""
    return Role(credential, INSPECTION, (), (), INSPECT, (_own_inbox(credential),))


def warden(credential: Credential) -> Role:
    """Finds and closes connections that flood, for `lacre up` and `keys tend --stay`. Has servers reload, for `lacre pool`."""
    return Role(credential, WARDEN, (), (), GUARD, (_own_inbox(credential),))


def gateway(
    credential: Credential, gateway_id: str, pools: Sequence[str], regions: Sequence[str] = subjects.ONE_REGION
) -> Role:
    """pools, regions: where it sends work. Each process has its own replies; sharing them, two would receive and cancel each
    other's.
    """
    subjects.check_gateway(gateway_id)
    processes = (gateway_id, *(subjects.process_name(gateway_id, number) for number in range(MAX_PROCESSES)))
    replies = (subjects.replies(name) for name in processes)
    tell = (f"{kind}.{pool}.*" for pool in pools for kind in TOLD_TO_WORKERS)
    return Role(
        credential,
        gateway_account(gateway_id),
        tuple(pools),
        tuple(regions),
        (
            *(service for pool in pools for region in regions for service in gateway_services(pool, region)),
            *tell,
            *(subjects.offers(pool, region, "*") for pool in pools for region in regions),
            READ_MANIFEST,
            subjects.revocation(credential.name),
            subjects.READ_REVOCATIONS,
            subjects.budgets_of(credential.name),
            subjects.READ_BUDGETS,
        ),
        (_own_inbox(credential), *replies, "presence.>", MAX_DELIVERIES),
    )


def worker(credential: Credential, pool: str, node: str | None, region: str = subjects.DEFAULT_REGION) -> Role:
    """node: None for a credential that all of a pool's workers share, like replicas of one deployment. They have the same keys
    and read the same queue. Such a credential can also forge the presence of another node of the pool, and hear a part of the
    offers to it. It can let them go unanswered, as it can drop work that it pulls: those requests fail, and none runs twice.
    """
    name = "*" if node is None else subjects.check_name("node", node)
    return Role(
        credential,
        workers_account(pool),
        (pool,),
        (region,),
        (*worker_services(pool, region), READ_MANIFEST, f"reply.{pool}.>", subjects.presence(pool, region, name)),
        (
            _own_inbox(credential),
            *(f"{kind}.{pool}.*" for kind in TOLD_TO_WORKERS),
            f"{subjects.offers(pool, region, name)} {OFFERS_GROUP}",
        ),
    )


def gateway_services(pool: str, region: str) -> tuple[str, ...]:
    """A gateway's JetStream requests about one pool in one region: queue work, withdraw it, count it."""
    stream = _queue(pool, region)
    return f"work.{pool}.{region}.*", f"{subjects.API}.STREAM.MSG.DELETE.{stream}", f"{subjects.API}.STREAM.INFO.{stream}"


def worker_services(pool: str, region: str) -> tuple[str, ...]:
    """A worker's JetStream requests: pull and ack from its pool's queue in its region, write and read claims."""
    stream, claims = _queue(pool, region), subjects.claims_bucket(pool)
    return (
        f"{subjects.API}.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
        f"$KV.{claims}.*",
        f"{subjects.API}.DIRECT.GET.KV_{claims}.>",
    )


def _queue(pool: str, region: str) -> str:
    return subjects.work_stream(subjects.check_name("pool", pool), subjects.check_region(region))


def workers_account(pool: str) -> str:
    return f"POOL_{pool}"


def gateway_account(gateway_id: str) -> str:
    return f"GATEWAY_{gateway_id}"


def _own_inbox(credential: Credential) -> str:
    return f"{subjects.inbox(credential.name)}.>"
