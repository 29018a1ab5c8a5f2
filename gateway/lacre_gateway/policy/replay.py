"""Decides an audit log's requests again under other rules: shows the effect of a proposed set.

Rules:
- An entry holds everything that its decision depended on, so a replay is exact. If it cannot be (an action that this version
  does not know, entities that another version wrote differently), the request is counted as unsure, never guessed.
- The new decision is compared with the recorded one. The rules of that time are named, but not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lacre.errors import InvalidMessage
from lacre_gateway.audit.entries import AdminIntent, Annex, Intent, parse
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.cases import KEMS
from lacre_gateway.policy.cedar import Decision, PolicySet
from lacre_gateway.policy.question import AdminAction, AdminQuestion, AnyQuestion, Question


@dataclass(frozen=True, slots=True)
class Asked:
    """A request from the log, and its decision. index: of its entry."""

    index: int
    members: Mapping[str, Any]
    was: Decision

    @property
    def resource(self) -> str:
        members = self.members
        return members["gateway"] if members["kind"] == AdminIntent.kind else f"{members['pool']}/{members['model']}"


@dataclass(frozen=True, slots=True)
class Change:
    """A request whose decision would change."""

    asked: Asked
    becomes: Decision


@dataclass(slots=True)
class Replay:
    """changes: requests whose decision changes. reasons: requests with the same decision by other policies.

    unsure: entries that cannot be decided again, and why.
    """

    decided: int = 0
    changes: list[Change] = field(default_factory=list)
    reasons: list[Change] = field(default_factory=list)
    unsure: list[tuple[int, str]] = field(default_factory=list)


def replay(entries: Iterable[bytes], policies: PolicySet, since: float | None = None, until: float | None = None) -> Replay:
    """entries: of a log, from its first one. since, until: seconds since the epoch. Raises InvalidMessage."""
    found = Replay()
    for asked in requests(entries):
        if (since is not None and asked.members["time"] < since) or (until is not None and asked.members["time"] >= until):
            continue
        try:
            becomes = policies.decide(question_of(asked.members))
        except InvalidMessage as exc:
            found.unsure.append((asked.index, str(exc)))
            continue
        if becomes.entities != asked.members["entities"]:
            found.unsure.append((asked.index, "its entities were written by another version"))
            continue
        found.decided += 1
        if becomes.allowed != asked.was.allowed:
            found.changes.append(Change(asked, becomes))
        elif becomes.policies != asked.was.policies:
            found.reasons.append(Change(asked, becomes))
    return found


def requests(entries: Iterable[bytes]) -> Iterator[Asked]:
    """Every decision in the log; an intent includes its annex. Raises InvalidMessage."""
    annex: dict[str, Any] = {}
    for index, data in enumerate(entries):
        members = parse(data)
        if members["kind"] == Annex.kind:
            annex = {name: members[name] for name in ("groups", "scopes", "policies")}
        elif members["kind"] in (Intent.kind, AdminIntent.kind):
            if members.get("annex") is not None:
                members.update(annex)
            was = Decision(members["decision"] == "allow", tuple(members["policies"]), members["policy_set"])
            yield Asked(index, members, was)


def question_of(members: Mapping[str, Any]) -> AnyQuestion:
    """The question that an intent or an admin entry records. Raises InvalidMessage if this version has no such question."""
    try:
        who = Principal(
            subject=members["subject"],
            tenant=members["tenant"],
            issuer=members["issuer"],
            groups=tuple(members["groups"]),
            scopes=tuple(members["scopes"]),
            plan=members["plan"],
        )
        if members["kind"] == AdminIntent.kind:
            action = AdminAction(members["action"])
            return AdminQuestion(who, action, members["gateway"], members["address"], members["time"])
        return Question(
            principal=who,
            action=Action(members["action"]),
            pool=members["pool"],
            model=members["model"],
            max_tokens=members.get("allowed_tokens") or members["max_tokens"],
            sealed_bytes=members["sealed_bytes"],
            kem=KEMS[members["kem"]],
            shape=Shape(members["shape"]),
            address=members["address"],
            time=members["time"],
            affinity=members.get("affinity") is True,
        )
    except (KeyError, ValueError) as exc:
        raise InvalidMessage("it is from another version: this one does not know its action, shape or KEM") from exc
