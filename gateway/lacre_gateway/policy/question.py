"""A request as rules see it: who asks, for which action, on which model or pool, under which circumstances.

Entities: `User::"tenant/subject"` in its `Group::"tenant/group"`s and its `Tenant::"tenant"`; `Model::"pool/model"` in
`Pool::"pool"`; `Gateway::"name"`. Names include their tenant, so that an issuer that is trusted for one tenant cannot name
users of another.

Rules:
- Everything that a decision may depend on is in `key` and in the audit log. So a decision can be remembered and repeated.
- Time enters as the hour (UTC) of the millisecond that the audit log records, and as the weekday and minute in the time zone of
  the set that decides (`policy.local_time`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from lacre.wire.header import Kem
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.local_time import TimeZone

# Added since the first version. A set whose schema is older decides without these members, and denies these actions.
LATER_MEMBERS: Final = frozenset({"weekday", "local_hour", "local_minute", "zone"})
LATER_ACTIONS: Final = ("admin:budget",)
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


@dataclass(frozen=True, slots=True)
class Question:
    """One sealed request. address: the caller's. time: seconds since the epoch, to the millisecond."""

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

    def key(self, zone: TimeZone) -> Hashable:
        asked = (self.max_tokens, self.sealed_bytes, self.kem, self.shape, self.address, hour(self.time), zone.at(self.time))
        return (self.entities_key, self.principal.scopes, self.principal.plan, self.action, *asked)

    @property
    def entities_key(self) -> Hashable:
        return (*_identity(self.principal), self.pool, self.model)

    def request(self, zone: TimeZone) -> dict[str, Any]:
        context = {
            **_circumstances(self.principal, self.address, self.time, zone),
            "max_tokens": self.max_tokens,
            "sealed_bytes": self.sealed_bytes,
            "kem": self.kem.label,
            "post_quantum": self.kem in _POST_QUANTUM,
            "shape": self.shape.value,
        }
        return _request(self.principal, self.action, {"type": "Model", "id": f"{self.pool}/{self.model}"}, context)

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

    def key(self, zone: TimeZone) -> Hashable:
        who = self.principal
        when = hour(self.time), zone.at(self.time)
        return (self.entities_key, who.scopes, who.plan, self.action, self.address, *when)

    @property
    def entities_key(self) -> Hashable:
        return (*_identity(self.principal), self.gateway)

    def request(self, zone: TimeZone) -> dict[str, Any]:
        context = _circumstances(self.principal, self.address, self.time, zone)
        return _request(self.principal, self.action, {"type": "Gateway", "id": self.gateway}, context)

    def entities(self) -> list[Entity]:
        return [*_people(self.principal), _entity({"type": "Gateway", "id": self.gateway})]


AnyQuestion = Question | AdminQuestion


def hour(time: float) -> int:
    """Of the day, UTC."""
    return int(time // _HOUR) % _DAY_HOURS


def _identity(who: Principal) -> tuple[Hashable, ...]:
    return who.subject, who.tenant, who.issuer, who.groups


def _request(who: Principal, action: StrEnum, resource: Entity, context: dict[str, Any]) -> dict[str, Any]:
    principal = {"type": "User", "id": f"{who.tenant}/{who.subject}"}
    return {
        "principal": principal,
        "action": {"type": "Action", "id": action.value},
        "resource": resource,
        "context": context,
    }


def _circumstances(who: Principal, address: str, time: float, zone: TimeZone) -> dict[str, Any]:
    plan = {} if who.plan is None else {"plan": who.plan}
    local = zone.at(time)
    there = {"weekday": local.weekday, "local_hour": local.hour, "local_minute": local.minute, "zone": zone.name}
    return {"scopes": list(who.scopes), "address": _ip(address), "hour": hour(time), **there, **plan}


def _ip(address: str) -> str:
    """The address in Cedar's form: no zone, and plain IPv4 if a socket for both families wrote it as IPv6.

    Other text stays unchanged, fits no schema, and so is denied.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _people(who: Principal) -> list[Entity]:
    tenant = {"type": "Tenant", "id": who.tenant}
    groups = [{"type": "Group", "id": f"{who.tenant}/{group}"} for group in who.groups]
    user = {"type": "User", "id": f"{who.tenant}/{who.subject}"}
    attributes = {"issuer": who.issuer, "name": who.subject}
    return [_entity(tenant), *(_entity(group, None, tenant) for group in groups), _entity(user, attributes, tenant, *groups)]


def _entity(uid: Entity, attributes: dict[str, str] | None = None, *parents: Entity) -> Entity:
    return {"uid": uid, "attrs": attributes or {}, "parents": list(parents)}
