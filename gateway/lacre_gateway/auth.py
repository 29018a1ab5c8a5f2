"""Who is asking: an access token (JWT, RFC 7519; used as RFC 6750 says) becomes a `Principal`, or a refusal.

Rules:
- The algorithm is chosen by the settings, never by the token: a key is usable only with the algorithms that are pinned for its
  issuer and fit its type. There is no symmetric one and no `none` (RFC 8725 sections 3.1 and 3.2).
- `iss`, `aud`, `exp`, `nbf` and `sub` must be there. `jku`, `x5u`, `x5c` and `jwk` in a token are never looked at.
- A verdict is remembered under the SHA-256 of the *whole* token, until its `exp`. Only good ones are.
- Whatever is wrong, the answer is the same 401. Neither the token nor an exception's text goes out, to a log or to the audit.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt

from lacre import problems
from lacre_gateway.keyset import KeySet
from lacre_gateway.refusal import Refusal
from lacre_gateway.throttle import FailureThrottle

# Well above any real token with groups, and below what would make hashing and parsing it worth an attacker's while.
MAX_TOKEN: Final = 16 * 1024
MAX_VERDICTS: Final = 16_384
MAX_NAME: Final = 256  # characters of a subject, group or scope
MAX_NAMES: Final = 256  # groups or scopes of one token

_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_END_OF_TIME: Final = 2**53
_DEFAULT_TENANT: Final = "default"
_CHALLENGE_MISSING: Final = b'Bearer realm="lacre"'
_CHALLENGE_INVALID: Final = b'Bearer realm="lacre", error="invalid_token"'


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
class TrustedIssuer:
    """One issuer and its keys. tenant: which one its tokens speak for; None lets the token say."""

    issuer: str
    audience: str
    keys: KeySet
    tenant: str | None
    leeway: float

    def principal(self, token: str, header: Mapping[str, Any]) -> tuple[Principal, float]:
        """The verified principal, and when the token expires. Raises jwt.PyJWTError or _BadClaim."""
        key = self.keys.find(header.get("kid"), header.get("alg"))
        if key is None:
            raise _BadClaim("kid")
        claims = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            audience=self.audience,
            issuer=self.issuer,
            leeway=self.leeway,
            options={"require": ["iss", "aud", "exp", "nbf", "sub"]},
        )
        tenant = self.tenant or _optional_name(claims, "tenant") or _DEFAULT_TENANT
        if not _TENANT.fullmatch(tenant):
            raise _BadClaim("tenant")
        principal = Principal(
            subject=_name(claims["sub"], "sub"),
            tenant=tenant,
            issuer=self.issuer,
            groups=_names(claims.get("groups"), "groups"),
            scopes=_names(claims.get("scope", claims.get("scp")), "scope"),
            plan=_optional_name(claims, "plan"),
            jti=_optional_name(claims, "jti"),
        )
        return principal, _time(claims["exp"]) + self.leeway


class Authenticator:
    """Verifies tokens, and remembers the good ones. clock: seconds since the epoch."""

    def __init__(self, issuers: Sequence[TrustedIssuer], throttle: FailureThrottle, clock: Callable[[], float]) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._throttle = throttle
        self._clock = clock
        self._verdicts: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def authenticate(self, authorization: bytes | None, address: str) -> Principal:
        """authorization: the header's value. address: the caller's. Raises Refusal."""
        if authorization is not None and len(authorization) > MAX_TOKEN:
            authorization = b""  # not worth hashing, and a bad one like any other
        digest = hashlib.sha256(authorization or b"").digest()
        known = self._verdicts.get(digest)
        if known is not None and self._clock() < known[1]:
            return known[0]
        # An address that only sends bad tokens must not buy a signature check with each; good cached ones still pass above.
        self._throttle.check(address)
        try:
            principal, expires = self._verify(_bearer(authorization))
        except (jwt.PyJWTError, _BadClaim) as exc:
            self._throttle.failed(address)
            challenge = _CHALLENGE_MISSING if authorization is None else _CHALLENGE_INVALID
            raise Refusal(problems.INVALID_TOKEN, challenge=challenge) from exc
        self._remember(digest, principal, expires)
        return principal

    def _verify(self, token: str) -> tuple[Principal, float]:
        # Unverified, and used for one thing: to choose which configured issuer's keys and rules the token is held against.
        unverified = jwt.decode_complete(token, options={"verify_signature": False})
        issuer = unverified["payload"].get("iss")
        trusted = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if trusted is None:
            raise _BadClaim("iss")
        return trusted.principal(token, unverified["header"])

    def _remember(self, digest: bytes, principal: Principal, expires: float) -> None:
        self._verdicts[digest] = (principal, expires)
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)


class _BadClaim(Exception):
    """A token that verifies nowhere here, or whose claims are not of the form asked for; names the claim only."""


def _bearer(authorization: bytes | None) -> str:
    match = _BEARER.fullmatch(authorization or b"")
    if match is None:
        raise _BadClaim("authorization")
    return match[1].decode("ascii")


def _time(value: object) -> float:
    """A NumericDate. PyJWT also takes digits in a string, and numbers that no float holds."""
    if not isinstance(value, int | float) or not value < _END_OF_TIME:
        raise _BadClaim("exp")
    return float(value)


def _name(value: object, claim: str) -> str:
    """A claim that names something. Control characters and lone surrogates have no place in a name, a log or a policy."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise _BadClaim(claim)
    return value


def _optional_name(claims: Mapping[str, Any], claim: str) -> str | None:
    value = claims.get(claim)
    return None if value is None else _name(value, claim)


def _names(value: object, claim: str) -> tuple[str, ...]:
    """A list of names, or names in one string divided by spaces (as RFC 8693 section 4.2 writes scopes)."""
    if value is None:
        return ()
    names = value.split(" ") if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_NAMES:
        raise _BadClaim(claim)
    return tuple(sorted({_name(name, claim) for name in names if name != ""}))
