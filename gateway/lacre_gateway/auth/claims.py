"""Turns a verified token's claims, by the issuer's names for them, into a `Principal`.

Rules:
- Claims are compared exactly: no case folding and no change of Unicode form (RFC 7519 section 2, StringOrURI).
- A claim that is present but unreadable is refused, never ignored: a rule that forbids by group must see every group.
- A list that the token refers to another place counts as unreadable, unless the settings say otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lacre import problems
from lacre.errors import Detail
from lacre.problems import Problem

MAX_NAME: Final = 256  # characters of a subject, group or scope
MAX_NAMES: Final = 256  # groups or scopes of one token
DEFAULT_TENANT: Final = "default"
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_END_OF_TIME: Final = 2**53
# No name has these characters, and they make logs and lists unreadable: controls, halves of characters, line and paragraph
# separators.
_UNREADABLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
# These change the display order of the text around them (UAX 9 sections 2.1 to 2.4): a list of names would lie.
_REORDERING: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Path = tuple[str, ...]  # the names of members, from the outermost in
_SCOPES: Final[tuple[Path, ...]] = (("scope",), ("scp",))  # RFC 9068 section 2.2.3, and the name that some issuers use
# Here a token refers to another place for claims: OpenID Connect Core 1.0 section 5.6.2, and Entra ID's own flag.
_CLAIM_NAMES: Final = "_claim_names"
_HAS_GROUPS: Final = "hasgroups"
_GROUPS: Final = "groups"
_GROUPS_LINK: Final = "http://schemas.microsoft.com/claims/groups.link"


@dataclass(frozen=True, slots=True)
class Principal:
    """The user whom a token names. groups and scopes are sorted and without repeats."""

    subject: str
    tenant: str
    issuer: str
    groups: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    plan: str | None = None
    jti: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """The names of an issuer's claims. scopes: None: `scope`, or `scp`.

    default_tenant: for a token that names none; None refuses it. elsewhere: whether to accept a token that refers to another
    place for groups, scopes or plan, as if it had none.
    """

    tenant: Path = ("tenant",)
    groups: Path = (_GROUPS,)
    scopes: Path | None = None
    plan: Path = ("plan",)
    default_tenant: str | None = DEFAULT_TENANT
    elsewhere: bool = False

    def principal(self, claims: Mapping[str, Any], issuer: str, tenant: str | None) -> Principal:
        """tenant: the one that the issuer's tokens are for; None: the token names it. Raises BadClaim."""
        if not self.elsewhere:
            self._check_here(claims, fixed=tenant is not None)
        return Principal(
            subject=_name(claims["sub"], "sub"),
            tenant=tenant or self._tenant(claims),
            issuer=issuer,
            groups=_names(_at(claims, self.groups, "groups"), "groups"),
            scopes=self._scopes(claims),
            plan=_optional_name(_at(claims, self.plan, "plan"), "plan"),
            jti=_optional_name(claims.get("jti"), "jti"),
        )

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        said = _at(claims, self.tenant, "tenant")
        tenant = self.default_tenant if said is None else said
        if tenant is None:
            raise BadClaim("tenant", MISSING)
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise BadClaim("tenant")
        return tenant

    def _scopes(self, claims: Mapping[str, Any]) -> tuple[str, ...]:
        """A list, or one text divided by spaces (RFC 8693 section 4.2). No other claim may be such a text."""
        values = (_at(claims, path, "scope") for path in self._scope_paths)
        value = next((value for value in values if value is not None), None)
        return _names(value.split(" ") if isinstance(value, str) else value, "scope")

    @property
    def _scope_paths(self) -> tuple[Path, ...]:
        return _SCOPES if self.scopes is None else (self.scopes,)

    def _check_here(self, claims: Mapping[str, Any], *, fixed: bool) -> None:
        """Raises BadClaim if the token refers to another place for a claim that decides. fixed: the settings name the
        tenant.
        """
        named = claims.get(_CLAIM_NAMES)
        if named is None:
            named = {}
        if not isinstance(named, Mapping):
            raise BadClaim(_CLAIM_NAMES)
        for claim, path in self._deciding(fixed=fixed):
            if path[0] in named or any(name.startswith(f"{path[0]}:src") for name in claims):
                raise BadClaim(claim, ELSEWHERE, problems.CLAIMS_ELSEWHERE)
        marked = claims.get(_HAS_GROUPS, False) not in (False, None) or _GROUPS_LINK in claims
        if marked and self.groups[0] == _GROUPS:
            raise BadClaim("groups", ELSEWHERE, problems.CLAIMS_ELSEWHERE)

    def _deciding(self, *, fixed: bool) -> Iterator[tuple[str, Path]]:
        yield "groups", self.groups
        yield from (("scope", path) for path in self._scope_paths)
        yield "plan", self.plan
        if not fixed:
            yield "tenant", self.tenant


# Why a claim is refused, in a word: for the bearer of a token whose signature holds, and for the log.
MALFORMED: Final = "malformed"
MISSING: Final = "missing"
ELSEWHERE: Final = "elsewhere"
TOO_MANY: Final = "too-many"
EXPIRED: Final = "expired"
NOT_YET: Final = "not-yet-valid"
TOO_LONG: Final = "lives-too-long"
FOREIGN: Final = "for-another-audience"
NOT_CHECKED: Final = "bound-in-another-way"
REVOKED: Final = "revoked"


class BadClaim(Exception):
    """The token's signature holds, but its claims cannot be used. Names the claim and the reason, never the value.

    problem: what its bearer gets. at: when it expired, in seconds since the epoch.
    """

    def __init__(
        self, claim: str, reason: str = MALFORMED, problem: Problem = problems.UNUSABLE_CLAIMS, at: float | None = None
    ) -> None:
        super().__init__(f"{claim}: {reason}")
        self.claim = claim
        self.reason = reason
        self.problem = problem
        self.at = at

    @property
    def details(self) -> dict[str, Detail]:
        claim = {} if self.reason == REVOKED else {"claim": self.claim}  # the whole token
        return {"reason": self.reason, **claim, **({} if self.at is None else {"expired_at": self.at})}


def bound_key(claims: Mapping[str, Any]) -> str | None:
    """The thumbprint of the key that the token is bound to (RFC 9449 section 6.1); None for a bearer token.

    Raises BadClaim for a binding that is not checked here, such as to a certificate (RFC 8705).
    """
    if "cnf" not in claims:
        return None
    confirmation = claims["cnf"]
    thumbprint = confirmation.get("jkt") if isinstance(confirmation, Mapping) and len(confirmation) == 1 else None
    if not is_name(thumbprint):
        raise BadClaim("cnf", NOT_CHECKED)
    return str(thumbprint)


def moment(claims: Mapping[str, Any], claim: str) -> float:
    """A NumericDate. PyJWT also accepts digits in a string, and numbers that no float holds. Raises BadClaim."""
    value = claims[claim]
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_END_OF_TIME < value < _END_OF_TIME:
        raise BadClaim(claim)
    return float(value)


def is_name(value: object) -> bool:
    """Whether the value can be a name in a policy, a log and a list: readable text of 1 to 256 characters.

    People's names have spaces of every width, joiners and direction marks; all of these are accepted.
    """
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        return False
    return value.isprintable() or not any(map(_is_unreadable, value))


def _is_unreadable(character: str) -> bool:
    nothing = ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"  # noncharacters (Unicode section 23.7)
    return nothing or character in _REORDERING or unicodedata.category(character) in _UNREADABLE


def _at(claims: Mapping[str, Any], path: Path, claim: str) -> Any:
    """The value at the end of the path; None if a part of the path is missing. Raises BadClaim if it leads through a value that
    is not an object.
    """  # fmt: skip
    value: Any = claims
    for name in path:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise BadClaim(claim)
        value = value.get(name)
    return value


def _name(value: object, claim: str) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise BadClaim(claim)
    return value


def _optional_name(value: object, claim: str) -> str | None:
    return None if value is None else _name(value, claim)


def _names(value: object, claim: str) -> tuple[str, ...]:
    """A list of names, or a single one: several issuers write a list of one as its only member."""
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise BadClaim(claim)
    if len(names) > MAX_NAMES:
        raise BadClaim(claim, TOO_MANY)
    return tuple(sorted({_name(name, claim) for name in names if name != ""}))
