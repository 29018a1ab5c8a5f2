"""Who is asking: turns an access token (JWT, RFC 9068; sent as in RFC 6750 or RFC 9449) into a `Principal`, or a refusal.

Rules:
- The settings choose the algorithm, never the token: a key works only with algorithms that are pinned for its issuer and fit
  its type. There is no symmetric one and no `none` (RFC 8725 sections 3.1 and 3.2).
- `iss`, `aud`, `exp`, `iat` and `sub` must be present, each once. `jku`, `x5u`, `x5c` and `jwk` in a token are ignored, and a
  token with `crit` is refused.
- A good verdict is remembered under the SHA-256 of the *whole* header, until the token's `exp` or until its issuer withdraws a
  key. Bad verdicts are not remembered. Revocation and proof are checked each time.
- A token that is bound to a key (`cnf`) needs that key's proof, which is for one request (see `lacre.jose.dpop`).
- A token whose signature does not hold always gets the same 401. The bearer of a genuine token learns which claim is refused
  and why, in fixed words (RFC 6750 section 3).
- No token, no value of a claim and no foreign exception's text reaches an answer, a log or the audit; the time of expiry does.
- Each refusal has its reason for the log: which check failed, on which claim, and for which issuer of the settings.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import jwt

from lacre import problems
from lacre.errors import Detail, InvalidMessage, LacreError
from lacre.jose import dpop
from lacre.jose.jws import b64u, read_object
from lacre.problems import Problem
from lacre.runtime import tasks
from lacre_fabric.work.revocations import subject_key, token_key
from lacre_gateway.auth import claims as says
from lacre_gateway.auth.claims import BadClaim, ClaimNames, Principal, bound_key, moment
from lacre_gateway.auth.jwks_remote import KeysUnavailable
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.http.refusal import NO_FACTS, Refusal

__all__ = ["Access", "Authenticator", "Principal", "TrustedIssuer"]

# Far above a real token with groups, and too little for an attacker to gain from our hashing and parsing.
MAX_TOKEN: Final = 16 * 1024
MAX_VERDICTS: Final = 16_384
MAX_PROOFS: Final = 65_536  # proofs to remember; the fabric still knows the request of a forgotten one
_RETRY: Final = 5.0  # seconds, while no token can be accepted
# Seconds in which requests may still wait for a replaced issuer: two documents, and the time between two fetches.
_LAST_ANSWERS: Final = 15.0

_CREDENTIALS: Final = re.compile(rb"(bearer|dpop) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)", re.IGNORECASE)
# The types of access tokens (RFC 9068 section 2.1), and the type that most issuers use: never a proof or a logout token.
_TYPES: Final = frozenset({"at+jwt", "application/at+jwt", "jwt"})
_REQUIRED: Final = ["iss", "aud", "exp", "iat", "sub"]

_ALGORITHMS: Final = " ".join(dpop.ALGORITHMS)
_MISSING: Final = f'Bearer realm="lacre", DPoP realm="lacre", algs="{_ALGORITHMS}"'.encode()
_ERROR: Final = {
    b"bearer": ('Bearer realm="lacre", error="invalid_token"', ""),
    b"dpop": ('DPoP realm="lacre", error="invalid_token"', f', algs="{_ALGORITHMS}"'),
}
# The fault of a genuine token, by PyJWT's errors: PyJWT checks the signature first.
_FAULTS: Final[tuple[tuple[type[jwt.PyJWTError], str, str, Problem], ...]] = (
    (jwt.ExpiredSignatureError, "exp", says.EXPIRED, problems.INVALID_TOKEN),
    (jwt.ImmatureSignatureError, "nbf", says.NOT_YET, problems.INVALID_TOKEN),
    (jwt.InvalidAudienceError, "aud", says.FOREIGN, problems.INVALID_TOKEN),
    (jwt.InvalidIssuedAtError, "iat", says.MALFORMED, problems.UNUSABLE_CLAIMS),
    (jwt.exceptions.InvalidSubjectError, "sub", says.MALFORMED, problems.UNUSABLE_CLAIMS),
    (jwt.exceptions.InvalidJTIError, "jti", says.MALFORMED, problems.UNUSABLE_CLAIMS),
)
_INVALID_PROOF: Final = f'DPoP realm="lacre", error="invalid_dpop_proof", algs="{_ALGORITHMS}"'.encode()


class Keys(Protocol):
    """An issuer's keys: a `KeySet`, or `RemoteKeys`. epoch: rises when one is withdrawn. usable: whether there are any."""

    @property
    def epoch(self) -> int: ...

    @property
    def usable(self) -> bool: ...

    def find(self, kid: object, alg: object) -> jwt.PyJWK | None:
        """Looks among the known keys."""

    async def seek(self, kid: object, alg: object) -> jwt.PyJWK | None:
        """Looks again after asking the issuer. Raises KeysUnavailable."""

    def start(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Access:
    """Who asks, and the proof; None for a bearer token."""

    principal: Principal
    proof: dpop.Proof | None = None

    def check_request(self, digest: bytes) -> None:
        """digest: SHA-256 of `hdr ‖ enc`. Raises Refusal if the proof is not for this sealed request."""
        if self.proof is not None and self.proof.request != b64u(digest):
            raise Refusal(problems.INVALID_PROOF, challenge=_INVALID_PROOF, noted="proof: for another sealed request")


@dataclass(frozen=True, slots=True)
class Examined:
    """A good token. bound: whether requests with it need a proof. expires_at: seconds since the epoch, with the leeway."""

    principal: Principal
    bound: bool
    expires_at: float


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """One issuer and its keys. tenant: the one that its tokens are for; None: the token names it. Times in seconds.

    leeway: how far its clock may be off. lifetime: the most that a token may have.
    """

    issuer: str
    audience: str
    keys: Keys
    algorithms: tuple[str, ...]
    tenant: str | None
    leeway: float
    lifetime: float
    names: ClaimNames

    async def key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        """Raises NotVerified or KeysUnavailable."""
        kid, alg = header.get("kid"), header.get("alg")
        if alg not in self.algorithms:
            raise NotVerified("alg", "not among this issuer's algorithms")
        key = self.keys.find(kid, alg) or await self.keys.seek(kid, alg)
        if key is None:
            raise NotVerified("kid", "not among this issuer's keys")
        return key

    def verdict(self, token: str, key: jwt.PyJWK, epoch: int) -> _Verdict:
        """Raises jwt.PyJWTError or BadClaim. epoch: of the keys, when `key` was found."""
        claims = self._claims(token, key)
        principal = self.names.principal(claims, self.issuer, self.tenant)
        expires, issued = moment(claims, "exp"), moment(claims, "iat")
        if expires - issued > self.lifetime:
            raise BadClaim("exp", says.TOO_LONG)
        names = [subject_key(self.issuer, principal.subject)]
        if principal.jti is not None:
            names.append(token_key(self.issuer, principal.jti))
        # If the issuer's clock is ahead, a token issued before a moment may claim to be issued after it.
        return _Verdict(
            Access(principal), self.keys, epoch, expires + self.leeway, issued - self.leeway, tuple(names), bound_key(claims)
        )

    def _claims(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        """Raises jwt.PyJWTError, or BadClaim for a token whose signature holds."""
        check: dict[str, Any] = {"algorithms": [key.algorithm_name], "audience": self.audience, "issuer": self.issuer}
        try:
            return jwt.decode(token, key, **check, leeway=self.leeway, options={"require": _REQUIRED})
        except jwt.MissingRequiredClaimError as exc:
            raise BadClaim(exc.claim, says.MISSING) from exc
        except tuple(fault[0] for fault in _FAULTS) as exc:
            raise _fault(exc, read_object(token.split(".")[1])) from exc


def _fault(error: jwt.PyJWTError, claims: Mapping[str, Any]) -> BadClaim:
    """claims: of the token, whose signature holds."""
    _, claim, reason, problem = next(fault for fault in _FAULTS if isinstance(error, fault[0]))
    if reason == says.NOT_YET and "iat" in str(error):
        claim = "iat"
    ended = max(0.0, moment(claims, claim)) if reason == says.EXPIRED else None
    return BadClaim(claim, reason, problem, ended)


class NotVerified(Exception):
    """The value is not a token of a known issuer. The text says by which part, and why, in fixed words."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {why}")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A good token. access: what it grants, without a proof. until, issued: seconds since the epoch, with the leeway.

    revocable: the keys by which it can be revoked. thumbprint: of the key that it is bound to.
    """

    access: Access
    keys: Keys
    epoch: int
    until: float
    issued: float
    revocable: tuple[str, ...]
    thumbprint: str | None


@dataclass(frozen=True, slots=True)
class _Shown:
    """The credentials of one request. method, url: of the request."""

    authorization: bytes | None = field(repr=False)
    proof: bytes | None = field(repr=False)
    method: str
    url: str


class Authenticator:
    """Verifies tokens and proofs, and remembers the good ones. clock: seconds since the epoch."""

    def __init__(
        self,
        issuers: Sequence[TrustedIssuer],
        revocations: RevocationList,
        throttle: FailureThrottle,
        clock: Callable[[], float],
    ) -> None:
        self.issuers = tuple(issuers)
        self._by_name = {issuer.issuer: issuer for issuer in issuers}
        self._revocations = revocations
        self._throttle = throttle
        self._clock = clock
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._leaving: list[TrustedIssuer] = []
        self._proofs: OrderedDict[bytes, None] = OrderedDict()

    @property
    def able(self) -> bool:
        """Whether any token could be accepted: not before some issuer's keys are known."""
        return any(issuer.keys.usable for issuer in self.issuers)

    def start(self) -> None:
        """Begins to fetch the keys of issuers. Called on the event loop; idempotent."""
        for issuer in self.issuers:
            issuer.keys.start()

    def replace(self, issuers: Sequence[TrustedIssuer]) -> None:
        """Judges all tokens by these issuers from now on. Nothing that was judged before is remembered."""
        if tuple(issuers) == self.issuers:
            return
        kept = [issuer.keys for issuer in issuers]
        leaving = [issuer for issuer in self.issuers if not any(issuer.keys is keys for keys in kept)]
        self.issuers = tuple(issuers)
        self._by_name = {issuer.issuer: issuer for issuer in issuers}
        self._verdicts = OrderedDict()
        self.start()
        self._leaving += leaving
        asyncio.get_running_loop().call_later(_LAST_ANSWERS, self._let_go, leaving)

    def set_failures(self, per_minute: int) -> None:
        """How often tokens of one address may fail in a minute."""
        self._throttle.set(per_minute)

    def _let_go(self, leaving: Sequence[TrustedIssuer]) -> None:
        self._leaving = [issuer for issuer in self._leaving if issuer not in leaving]
        for issuer in leaving:
            tasks.detach("old issuer", issuer.keys.close())

    async def close(self) -> None:
        for issuer in (*self.issuers, *self._leaving):
            await issuer.keys.close()

    async def authenticate(
        self, authorization: bytes | None, address: str, *, proof: bytes | None = None, method: str = "POST", url: str = ""
    ) -> Access:
        """authorization, proof: the values of the headers `Authorization` and `DPoP`. address: the caller's. method, url: of
        the request, in the form of `dpop.plain_url`. Raises Refusal.

        For a token that was seen before, it does not wait for anything.
        """  # fmt: skip
        verdict = await self._judged(authorization, address)
        if not self._revocations.current:
            raise Refusal(problems.UNAVAILABLE, retry_after=_RETRY, noted=self._revocations.fault)
        self._check_revoked(verdict, authorization)
        if verdict.thumbprint is None:
            return verdict.access
        return self._proved(verdict, _Shown(authorization, proof, method, url), address)

    async def examine(self, authorization: bytes) -> Examined:
        """Judges a token as `authenticate` does, but asks for no proof. A list of revocations that is not current counts as
        empty. Raises Refusal.
        """
        verdict = await self._judged(authorization, "")
        if self._revocations.current:
            self._check_revoked(verdict, None)
        return Examined(verdict.access.principal, verdict.thumbprint is not None, verdict.until)

    def _check_revoked(self, verdict: _Verdict, authorization: bytes | None) -> None:
        """Raises Refusal, with a challenge for the scheme that was used; None: for bearer tokens."""
        if self._revocations.refuses(verdict.revocable, verdict.issued):
            revoked = BadClaim("token", says.REVOKED, problems.INVALID_TOKEN)
            raise _unusable(revoked, _credentials(authorization)[0], {"issuer": verdict.access.principal.issuer})

    async def _judged(self, authorization: bytes | None, address: str) -> _Verdict:
        """The verdict on a good token, remembered or new. Raises Refusal."""
        if authorization is not None and len(authorization) > MAX_TOKEN:  # too long to be worth hashing, even if genuine
            self._throttle.check(address)
            self._throttle.failed(address)
            size: dict[str, Detail] = {"limit": "token", "unit": "bytes", "ceiling": MAX_TOKEN, "asked": len(authorization)}
            noted = f"size: over {MAX_TOKEN} bytes"
            raise Refusal(problems.INVALID_TOKEN, challenge=_challenge(b"bearer"), details=size, noted=noted)
        digest = hashlib.sha256(authorization or b"").digest()
        verdict = self._verdicts.get(digest)
        if verdict is None or verdict.epoch != verdict.keys.epoch or self._clock() >= verdict.until:
            remembered = self._verdicts
            verdict = await self._verified(authorization, address)
            if remembered is self._verdicts:  # otherwise the issuers were replaced meanwhile
                self._remember(digest, verdict)
        return verdict

    async def _verified(self, authorization: bytes | None, address: str) -> _Verdict:
        # An address that only sends bad tokens must not cause a signature check with each; good remembered tokens need none.
        self._throttle.check(address)
        scheme, token = _credentials(authorization)
        facts: dict[str, str] = {}
        try:
            if token is None:
                raise NotVerified("authorization", "missing" if authorization is None else "not a JWT")
            with self._throttle.verifying(address):
                issuer, header = self._issuer(token)
                facts["issuer"] = issuer.issuer
                key = await issuer.key(header)
                verdict = issuer.verdict(token, key, issuer.keys.epoch)
            if verdict.thumbprint is None and scheme == b"dpop":
                raise BadClaim("cnf", says.MISSING, problems.INVALID_TOKEN)
        except KeysUnavailable as exc:
            raise Refusal(problems.ISSUER_UNAVAILABLE, retry_after=_RETRY, noted=str(exc), facts=facts) from exc
        except BadClaim as exc:
            self._throttle.failed(address)
            raise _unusable(exc, scheme, facts) from exc
        except (jwt.PyJWTError, NotVerified, InvalidMessage) as exc:
            self._throttle.failed(address)
            if authorization is None:
                missing = {"reason": says.MISSING}
                raise Refusal(problems.INVALID_TOKEN, challenge=_MISSING, details=missing, noted=_noted(exc)) from exc
            raise Refusal(problems.INVALID_TOKEN, challenge=_challenge(scheme), noted=_noted(exc), facts=facts) from exc
        return verdict

    def _issuer(self, token: str) -> tuple[TrustedIssuer, Mapping[str, Any]]:
        """The configured issuer whose keys and rules judge the token, and the token's header. Nothing is verified yet.

        Raises NotVerified or InvalidMessage.
        """
        head, payload, _ = token.split(".")
        header, claims = read_object(head), read_object(payload)
        if "crit" in header:
            raise NotVerified("crit", "not understood")
        if str(header.get("typ", "jwt")).lower() not in _TYPES:
            raise NotVerified("typ", "not an access token")
        issuer = claims.get("iss")
        trusted = self._by_name.get(issuer) if isinstance(issuer, str) else None
        if trusted is None:
            raise NotVerified("iss", "missing" if issuer is None else "not in the settings")
        return trusted, header

    def _proved(self, verdict: _Verdict, shown: _Shown, address: str) -> Access:
        """Raises Refusal unless the sender of the token has its key."""
        scheme, token = _credentials(shown.authorization)
        try:
            if scheme != b"dpop" or token is None:
                raise InvalidMessage("a token that is bound to a key needs the scheme DPoP")
            if shown.proof is None:
                raise InvalidMessage("a token that is bound to a key needs a proof")
            expected = dpop.Expected(shown.method, shown.url, dpop.token_hash(token), str(verdict.thumbprint))
            proof = dpop.verify(shown.proof.decode("latin-1"), expected, self._clock())
            self._spend(proof)
        except LacreError as exc:
            self._throttle.failed(address)
            # These errors are our own. They quote nothing of the proof.
            raise Refusal(problems.INVALID_PROOF, challenge=_INVALID_PROOF, noted=f"proof: {exc}") from exc
        return Access(verdict.access.principal, proof)

    def _spend(self, proof: dpop.Proof) -> None:
        """Each proof is valid once (RFC 9449 section 11.1). Raises InvalidMessage."""
        if proof.identity in self._proofs:
            raise InvalidMessage("the DPoP proof was used before")
        self._proofs[proof.identity] = None
        while len(self._proofs) > MAX_PROOFS:
            self._proofs.popitem(last=False)

    def _remember(self, digest: bytes, verdict: _Verdict) -> None:
        self._verdicts[digest] = verdict
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)


def _unusable(fault: BadClaim, scheme: bytes, facts: Mapping[str, str] = NO_FACTS) -> Refusal:
    """For the bearer of a token whose signature holds."""
    ended = (
        ""
        if fault.at is None
        else datetime.datetime.fromtimestamp(int(fault.at), datetime.UTC).strftime(" at %Y-%m-%dT%H:%M:%SZ")
    )
    challenge = _challenge(scheme, f"{fault.claim}: {fault.reason}{ended}")
    return Refusal(fault.problem, challenge=challenge, details=fault.details, noted=str(fault), facts=facts)


def _noted(fault: Exception) -> str:
    """For the operator: what shows that the token is not one of ours. Never quotes the token."""
    if isinstance(fault, NotVerified):
        return str(fault)
    if isinstance(fault, jwt.InvalidSignatureError):
        return "signature: not by this issuer's key"
    return "form: not two JSON objects and a signature, or a member appears twice"


def _challenge(scheme: bytes, description: str = "") -> bytes:
    """description: in the characters of `error_description` (RFC 6750 section 3)."""
    error, rest = _ERROR[scheme]
    said = f', error_description="{description}"' if description else ""
    return f"{error}{said}{rest}".encode()


def _credentials(authorization: bytes | None) -> tuple[bytes, str | None]:
    """The scheme in lower case, and the token; None if the header is malformed."""
    match = _CREDENTIALS.fullmatch(authorization or b"")
    return (b"bearer", None) if match is None else (match[1].lower(), match[2].decode("ascii"))
