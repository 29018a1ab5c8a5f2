"""Requests written down as JSON: the cases beside the rules.

`cases/ALLOW/NAME.json` must be allowed, `cases/DENY/NAME.json` denied. If a case has `decided_by`, exactly those policies must
decide it. A set whose cases do not hold is never activated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from lacre.errors import SettingsError
from lacre.wire.header import Kem
from lacre_fabric.settings import Table, validated
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.cedar import Decision, PolicyError
from lacre_gateway.policy.question import AdminAction, AdminQuestion, AnyQuestion, Question

FOLDER: Final = "cases"
CASE: Final = "case"  # the fault of a case that does not hold, or cannot be read
KEMS: Final = {kem.label: kem for kem in Kem}

Hour = Annotated[int, Field(ge=0, le=23)]
_NOON: Final = 12


def _instant(value: object) -> object:
    """RFC 3339, with its offset: a time without one would be another on each machine."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise PydanticCustomError("time", "write a time with its offset, such as 2026-11-28T23:30:00Z")
    return found.timestamp()


class _Timed(Table):
    """hour: of the day, UTC, of a Thursday; default: noon. time: instead, a moment as in RFC 3339."""

    hour: Hour | None = None
    time: Annotated[float, BeforeValidator(_instant)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.hour is not None and self.time is not None:
            raise PydanticCustomError("time", "write either `hour` or `time`")
        return self

    @property
    def moment(self) -> float:
        """Seconds since the epoch."""
        return 3600.0 * (_NOON if self.hour is None else self.hour) if self.time is None else self.time


class Who(Table):
    """A principal."""

    subject: str
    tenant: str
    issuer: str = "https://issuer.example"
    groups: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    plan: str | None = None

    def principal(self) -> Principal:
        return Principal(
            subject=self.subject,
            tenant=self.tenant,
            issuer=self.issuer,
            groups=tuple(sorted(set(self.groups))),
            scopes=tuple(sorted(set(self.scopes))),
            plan=self.plan,
        )


class WrittenRequest(Protocol):
    """A request that was written down. decided_by: None if it does not matter."""

    @property
    def decided_by(self) -> tuple[str, ...] | None: ...

    def question(self) -> AnyQuestion: ...


class SealedRequest(_Timed):
    """A request to a model."""

    principal: Who
    action: Action
    pool: str
    model: str
    max_tokens: int
    sealed_bytes: int
    kem: Literal["MLKEM768-X25519", "X25519"]
    shape: Shape
    address: str = "192.0.2.1"
    affinity: bool = False
    decided_by: tuple[str, ...] | None = None

    def question(self) -> Question:
        return Question(
            principal=self.principal.principal(),
            action=self.action,
            pool=self.pool,
            model=self.model,
            max_tokens=self.max_tokens,
            sealed_bytes=self.sealed_bytes,
            kem=KEMS[self.kem],
            shape=self.shape,
            address=self.address,
            time=self.moment,
            affinity=self.affinity,
        )


class AdminRequest(_Timed):
    """A request to a gateway itself."""

    principal: Who
    action: AdminAction
    gateway: str = "g1"
    address: str = "192.0.2.1"
    decided_by: tuple[str, ...] | None = None

    def question(self) -> AdminQuestion:
        return AdminQuestion(self.principal.principal(), self.action, self.gateway, self.address, self.moment)


@dataclass(frozen=True, slots=True)
class PolicyCase:
    """name: of its file, below the set's folder."""

    name: str
    allowed: bool
    request: WrittenRequest

    @classmethod
    def parse(cls, name: str, data: bytes) -> PolicyCase:
        """Raises PolicyError."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise PolicyError(CASE, name, "not JSON") from exc
        return cls(name, PurePosixPath(name).parent.name == "ALLOW", written(name, values))

    def fails(self, decision: Decision) -> str | None:
        """The fault of the decision; None if it is as the case demands."""
        due = self.request.decided_by
        if decision.allowed != self.allowed:
            by = f" by {', '.join(decision.policies)}" if decision.policies else ""
            return f"it must be {'allowed' if self.allowed else 'denied'}, and is {_word(decision.allowed)}{by}"
        if due is not None and decision.policies != tuple(sorted(due)):
            return f"it must be decided by {', '.join(due) or 'none'}, and is by {', '.join(decision.policies) or 'none'}"
        return None


def written(name: str, values: Any) -> WrittenRequest:
    """Raises PolicyError."""
    action = values.get("action") if isinstance(values, dict) else None
    try:
        if action in set(AdminAction):
            return validated(AdminRequest, values, Path(name))
        return validated(SealedRequest, values, Path(name))
    except SettingsError as exc:
        raise PolicyError(CASE, "", str(exc)) from exc


def _word(allowed: bool) -> str:
    return "allowed" if allowed else "denied"
