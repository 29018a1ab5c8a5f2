"""What a verified token says of whom it speaks for: its claims, by the names that the issuer has for them, as a `Principal`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_NAME: Final = 256  # characters of a subject, group or scope
MAX_NAMES: Final = 256  # groups or scopes of one token
DEFAULT_TENANT: Final = "default"
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_END_OF_TIME: Final = 2**53

Path = tuple[str, ...]  # the names of members, from the outermost in
_SCOPES: Final[tuple[Path, ...]] = (("scope",), ("scp",))  # RFC 9068 section 2.2.3, and what some issuers have in its place


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a token speaks for. groups and scopes are sorted and without repeats."""

    subject: str
    tenant: str
    issuer: str
    groups: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    plan: str | None = None
    jti: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Where an issuer's tokens say what. scopes: None for `scope`, or `scp`."""

    tenant: Path = ("tenant",)
    groups: Path = ("groups",)
    scopes: Path | None = None
    plan: Path = ("plan",)

    def principal(self, claims: Mapping[str, Any], issuer: str, tenant: str | None) -> Principal:
        """tenant: the one that the issuer's tokens speak for; None lets the token say. Raises BadClaim."""
        tenant = tenant or _optional_name(_at(claims, self.tenant), "tenant") or DEFAULT_TENANT
        if not _TENANT.fullmatch(tenant):
            raise BadClaim("tenant")
        scopes = (_at(claims, path) for path in (_SCOPES if self.scopes is None else (self.scopes,)))
        return Principal(
            subject=_name(claims["sub"], "sub"),
            tenant=tenant,
            issuer=issuer,
            groups=_names(_at(claims, self.groups), "groups"),
            scopes=_names(next((value for value in scopes if value is not None), None), "scope"),
            plan=_optional_name(_at(claims, self.plan), "plan"),
            jti=_optional_name(claims.get("jti"), "jti"),
        )


class BadClaim(Exception):
    """A token that verifies nowhere here, or whose claims are not of the form asked for; names the claim only."""


def bound_key(claims: Mapping[str, Any]) -> str | None:
    """The thumbprint of the key that the token is bound to (RFC 9449 section 6.1); None for one that whoever has it may use.

    Raises BadClaim for a token that is bound in a way that is not checked here, such as to a certificate (RFC 8705).
    """
    if "cnf" not in claims:
        return None
    confirmation = claims["cnf"]
    thumbprint = confirmation.get("jkt") if isinstance(confirmation, Mapping) and len(confirmation) == 1 else None
    return _name(thumbprint, "cnf")


def moment(claims: Mapping[str, Any], claim: str) -> float:
    """A NumericDate. PyJWT also takes digits in a string, and numbers that no float holds. Raises BadClaim."""
    value = claims[claim]
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_END_OF_TIME < value < _END_OF_TIME:
        raise BadClaim(claim)
    return float(value)


def _at(claims: Mapping[str, Any], path: Path) -> Any:
    """The value at the end of the path; None where it leads nowhere."""
    value: Any = claims
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _name(value: object, claim: str) -> str:
    """A claim that names something. Control characters and lone surrogates have no place in a name, a log or a policy."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise BadClaim(claim)
    return value


def _optional_name(value: object, claim: str) -> str | None:
    return None if value is None else _name(value, claim)


def _names(value: object, claim: str) -> tuple[str, ...]:
    """A list of names, or names in one string divided by spaces (as RFC 8693 section 4.2 writes scopes)."""
    if value is None:
        return ()
    names = value.split(" ") if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_NAMES:
        raise BadClaim(claim)
    return tuple(sorted({_name(name, claim) for name in names if name != ""}))
