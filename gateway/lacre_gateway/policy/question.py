"""A request as rules see it: who asks, for which action, on which model or pool, under which circumstances.

Entities: `User::"tenant/subject"` in its `Group::"tenant/group"`s and its `Tenant::"tenant"`; `Model::"pool/model"` in
`Pool::"pool"`; `Gateway::"name"`. Names include their tenant, so that an issuer that is trusted for one tenant cannot name
users of another.

Rules:
- Everything that a decision may depend on is in the audit log, so a decision can be repeated.
- A decision is remembered by `key`: the values that Cedar sees of what the rules read (`policy.reads`), and no others. The key
  always says whether the address is one, because no schema accepts another text.
- Time enters as the hour (UTC) of the millisecond that the audit log records, and as the weekday and minute in the time zone of
  the set that decides (`policy.local_time`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

from lacre.runtime.records import record
from lacre.wire.header import Kem
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.local_time import TimeZone
from lacre_gateway.policy.reads import Reads

# Added since the first version, the newest first. A set whose schema is older decides without these members, and denies these
# actions.
_NEWEST: Final = frozenset({"affinity"})
LATER_MEMBERS: Final = _NEWEST | {"weekday", "local_hour", "local_minute", "zone"}
OMITTED_BY_OLDER: Final = (_NEWEST, LATER_MEMBERS)
LATER_ACTIONS: Final = ("admin:budget", "admin:audit", "admin:drain_worker")
_POST_QUANTUM: Final = frozenset({Kem.XWING})
_HOUR: Final = 3600
_DAY_HOURS: Final = 24

Entity = dict[str, Any]


class AdminAction(StrEnum):
    """The actions on a gateway itself."""

    USAGE = "admin:usage"
    REVOKE = "admin:revoke"
    RELOAD = "admin:reload"
    DRAIN = "admin:drain"
    BUDGET = "admin:budget"
    AUDIT = "admin:audit"
    DRAIN_WORKER = "admin:drain_worker"


@lru_cache(maxsize=1024)
def _ip(address: str) -> tuple[str, bool]:
    """The address in Cedar's form, and whether it is one: no zone, and plain IPv4 if a socket for both families wrote it as
    IPv6. Other text stays unchanged, fits no schema, and so is denied.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address, False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed), True


def _people(who: Principal) -> list[Entity]:
    tenant = {"type": "Tenant", "id": who.tenant}
    groups = [{"type": "Group", "id": f"{who.tenant}/{group}"} for group in who.groups]
    user = {"type": "User", "id": f"{who.tenant}/{who.subject}"}
    attributes = {"issuer": who.issuer, "name": who.subject}
    return [_entity(tenant), *(_entity(group, None, tenant) for group in groups), _entity(user, attributes, tenant, *groups)]


def _entity(uid: Entity, attributes: dict[str, str] | None = None, *parents: Entity) -> Entity:
    return {"uid": uid, "attrs": attributes or {}, "parents": list(parents)}


@record(frozen=True, slots=True)
class Question:
    """One sealed request. address: the caller's. time: seconds since the epoch, to the millisecond. affinity: whether it says
    which requests are of its conversation; false if no rule reads that.
    """

    principal: Principal
    action: Action
    pool: str
    model: str
    max_tokens: int
    sealed_bytes: int
    kem: Kem
    shape: Shape
    address: str
    time: float
    affinity: bool = False

    @property
    def entities_key(self) -> Hashable:
        return (*_identity(self.principal), self.pool, self.model)

    @property
    def place(self) -> Hashable:
        return self.pool, self.model

    def request(self, zone: TimeZone) -> dict[str, Any]:
        return _request(self, {"type": "Model", "id": f"{self.pool}/{self.model}"}, zone)

    def entities(self) -> list[Entity]:
        pool = {"type": "Pool", "id": self.pool}
        model = {"type": "Model", "id": f"{self.pool}/{self.model}"}
        return [*_people(self.principal), _entity(pool), _entity(model, {"name": self.model}, pool)]


@dataclass(frozen=True, slots=True)
class AdminQuestion:
    """An action on a gateway itself. gateway: its name."""

    principal: Principal
    action: AdminAction
    gateway: str
    address: str
    time: float

    @property
    def entities_key(self) -> Hashable:
        return (*_identity(self.principal), self.gateway)

    @property
    def place(self) -> Hashable:
        return self.gateway

    def request(self, zone: TimeZone) -> dict[str, Any]:
        return _request(self, {"type": "Gateway", "id": self.gateway}, zone)

    def entities(self) -> list[Entity]:
        return [*_people(self.principal), _entity({"type": "Gateway", "id": self.gateway})]


AnyQuestion = Question | AdminQuestion

# The members of the context, each with its value. A value of None leaves the member out.
_OF_ALL: Final[Mapping[str, Callable[[Any, TimeZone], Hashable]]] = {
    "scopes": lambda asked, _zone: asked.principal.scopes,
    "plan": lambda asked, _zone: asked.principal.plan,
    "address": lambda asked, _zone: _ip(asked.address)[0],
    "hour": lambda asked, _zone: hour(asked.time),
    "weekday": lambda asked, zone: zone.at(asked.time).weekday,
    "local_hour": lambda asked, zone: zone.at(asked.time).hour,
    "local_minute": lambda asked, zone: zone.at(asked.time).minute,
    "zone": lambda _asked, zone: zone.name,
}
_MEMBERS: Final[Mapping[type, Mapping[str, Callable[[Any, TimeZone], Hashable]]]] = {
    AdminQuestion: _OF_ALL,
    Question: {
        **_OF_ALL,
        "max_tokens": lambda asked, _zone: asked.max_tokens,
        "sealed_bytes": lambda asked, _zone: asked.sealed_bytes,
        "kem": lambda asked, _zone: asked.kem.label,
        "post_quantum": lambda asked, _zone: asked.kem in _POST_QUANTUM,
        "shape": lambda asked, _zone: asked.shape.value,
        "affinity": lambda asked, _zone: asked.affinity or None,
    },
}


class VerdictKeys:
    """Makes the keys of questions to one set of rules: equal for two questions whose decisions must be equal."""

    def __init__(self, reads: Reads, zone: TimeZone) -> None:
        self._reads = reads
        self._zone = zone
        self._read = {
            kind: tuple(value for name, value in members.items() if reads.member(name)) for kind, members in _MEMBERS.items()
        }

    def of(self, asked: AnyQuestion) -> Hashable:
        reads, who, zone = self._reads, asked.principal, self._zone
        people = _identity(who) if reads.identity else (who.tenant, who.groups) if reads.groups else None
        place = asked.place if reads.resource else None
        return (asked.action, _ip(asked.address)[1], people, place, *[value(asked, zone) for value in self._read[type(asked)]])


def hour(time: float) -> int:
    """Of the day, UTC."""
    return int(time // _HOUR) % _DAY_HOURS


def _identity(who: Principal) -> tuple[Hashable, ...]:
    return who.subject, who.tenant, who.issuer, who.groups


def _request(asked: AnyQuestion, resource: Entity, zone: TimeZone) -> dict[str, Any]:
    values = {name: value(asked, zone) for name, value in _MEMBERS[type(asked)].items()}
    return {
        "principal": {"type": "User", "id": f"{asked.principal.tenant}/{asked.principal.subject}"},
        "action": {"type": "Action", "id": asked.action.value},
        "resource": resource,
        "context": {
            name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
        },
    }
