"""What rules read of a question. A decision depends on nothing else, so it can be remembered by this alone.

Rules:
- Found in the parsed policies: in their scopes and in their conditions. An entity of an unknown type counts for both sides.
- A rule that names an entity in a condition may ask where that entity stands among those of the question. So it reads that
  side of the question.
- No I/O.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cedarpy import pst

WHOLE: Final = "*"  # a policy that reads the context as one value
_CONTEXT, _PRINCIPAL, _RESOURCE = pst.Var("context"), pst.Var("principal"), pst.Var("resource")
# Memberships of these hold for everyone of a tenant and of its groups.
_SHARED: Final = frozenset({pst.EntityType("Group"), pst.EntityType("Tenant")})
_OF_PEOPLE: Final = _SHARED | {pst.EntityType("User")}
_OF_PLACES: Final = frozenset({pst.EntityType("Model"), pst.EntityType("Pool"), pst.EntityType("Gateway")})
_ACTION: Final = pst.EntityType("Action")  # its families are in the schema, the same for every question


@dataclass(frozen=True, slots=True)
class Reads:
    """context: names of members, or `WHOLE`. groups: whether a rule reads in which groups and tenant a principal is; identity:
    whether it reads more of the principal, such as its name. resource: whether it reads the model, the pool or the gateway.
    """

    context: frozenset[str] = frozenset()
    groups: bool = False
    identity: bool = False
    resource: bool = False

    def __or__(self, other: Reads) -> Reads:
        return Reads(
            self.context | other.context,
            self.groups or other.groups,
            self.identity or other.identity,
            self.resource or other.resource,
        )

    def member(self, name: str) -> bool:
        return name in self.context or WHOLE in self.context


_EVERYONE: Final = Reads(groups=True)
_PERSON: Final = Reads(groups=True, identity=True)
_PLACE: Final = Reads(resource=True)
_NOTHING: Final = Reads()


def of(policies: Iterable[pst.Template]) -> Reads:
    """What these policies read between them."""
    found = _NOTHING
    for policy in policies:
        found = found | _of_principal(policy.principal) | _of_resource(policy.resource)
        for clause in policy.clauses:
            for each in _reads(clause):
                found = found | each
    return found


def context_of(policy: pst.Template) -> frozenset[str]:
    """The members of the context that its conditions name, or `WHOLE`."""
    return frozenset(name for clause in policy.clauses for each in _reads(clause) for name in each.context)


def _of_principal(constraint: object) -> Reads:
    if isinstance(constraint, pst.ScopeAny | pst.ScopeIs):  # every principal is a User
        return _NOTHING
    shared = isinstance(constraint, pst.ScopeIn | pst.ScopeIsIn) and _type_of(constraint.entity) in _SHARED
    return _EVERYONE if shared else _PERSON


def _of_resource(constraint: object) -> Reads:
    """Models and gateways are asked about by different actions, so a type alone says nothing more."""
    return _NOTHING if isinstance(constraint, pst.ScopeAny | pst.ScopeIs) else _PLACE


def _reads(node: Any) -> Iterator[Reads]:
    match node:
        case pst.GetAttr(base=base, attr=name) if base == _CONTEXT:
            yield Reads(frozenset({name}))
        case pst.HasAttr(base=base, attrs=names) if base == _CONTEXT:
            yield Reads(frozenset({names[0]}))
        case pst.BinaryOp(op="in", left=left, right=right) if left == _PRINCIPAL and _all_shared(right):
            yield _EVERYONE
        case pst.Var():
            yield _of_variable(node)
        case pst.EntityLit(value=entity):
            yield _of_entity(entity.type)
        case pst.EntityUid(type=kind):
            yield _of_entity(kind)
        case Mapping():
            for value in node.values():
                yield from _reads(value)
        case tuple():
            for value in node:
                yield from _reads(value)
        case _ if dataclasses.is_dataclass(node):
            for member in dataclasses.fields(node):
                yield from _reads(getattr(node, member.name))


def _of_variable(variable: pst.Var) -> Reads:
    if variable == _CONTEXT:
        return Reads(frozenset({WHOLE}))
    if variable == _PRINCIPAL:
        return _PERSON
    return _PLACE if variable == _RESOURCE else _NOTHING  # the action is always known


def _of_entity(kind: pst.EntityType) -> Reads:
    if kind in _OF_PEOPLE:
        return _PERSON
    if kind in _OF_PLACES:
        return _PLACE
    return _NOTHING if kind == _ACTION else _PERSON | _PLACE


def _all_shared(node: object) -> bool:
    """Whether it is an entity that whole groups are members of, or a set of such."""
    if isinstance(node, pst.Set):
        return all(map(_all_shared, node.elements))
    return isinstance(node, pst.EntityLit) and node.value.type in _SHARED


def _type_of(entity: object) -> pst.EntityType | None:
    return entity.type if isinstance(entity, pst.EntityUid) else None
