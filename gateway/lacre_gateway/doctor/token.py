"""`lacre token check`: judges one access token as a gateway with these settings would, and says what decided.

Rules:
- The gateway's own code judges. So the reason is the one in the gateway's log.
- The person who has the token may see what it says. Nothing of its signature is printed, and nothing of it is logged.
- It takes no request and needs no running gateway. Without NATS it cannot know revocations or models, and says so.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.jose.jws import read_object
from lacre.runtime.hosts import without_secrets
from lacre.trust.chain import verify
from lacre.trust.manifest import Manifest
from lacre.wire.header import Kem
from lacre.wire.outer import MAX_TOKENS
from lacre_fabric.logs import make_log
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.revocations import RevocationReader
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.revocations import Revocation, StoreMark
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.auth.tokens import Authenticator, Examined, Principal
from lacre_gateway.budget.plans import Plans
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.denial import lowered
from lacre_gateway.policy.question import AdminAction, AdminQuestion, AnyQuestion, Question
from lacre_gateway.policy.rules import RuleSet
from lacre_gateway.settings import GatewaySettings, Issuer, shipped

_PARTS: Final = 3  # of a JWT in its compact form
_STANDARD: Final = (("iss",), ("aud",), ("sub",), ("iat",), ("nbf",), ("exp",), ("jti",), ("cnf",))
_CLAIMS: Final = {
    "tenant": "a name (the settings give none with `tenant` or `default_tenant`)",
    "groups": "a list of at most 256 names",
    "plan": "a name, or nothing",
}
_HEADER: Final = (("typ",), ("alg",), ("kid",))


@dataclass(frozen=True, slots=True)
class Permission:
    """An action that the rules allow. target: pool/model, or the gateway's name. most: output tokens; None: as many as fit."""

    action: str
    target: str
    most: int | None = None


@dataclass(frozen=True, slots=True)
class TokenReport:
    """accepted: whether a gateway would accept the token. reason, problem: as in its log, of a refusal. expected: what the
    settings ask for instead. genuine: whether the signature of the issuer holds; None: not known.

    header, claims: what the token says, verified only if it is genuine; None: it lacks a claim that the settings name. issuer:
    if the settings have it. key: where its keys are. plan: the caller's, with its limits. may: what the rules allow now.
    unchecked: what could not be checked, and why.
    """

    accepted: bool
    genuine: bool | None
    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    issuer: str = ""
    key: str = ""
    reason: str = ""
    problem: str = ""
    expected: str = ""
    remedy: str = ""
    principal: Principal | None = None
    bound: bool = False
    expires_at: float | None = None
    plan: str | None = None
    limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    may: tuple[Permission, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(slots=True)
class KnownByFabric:
    """What the gateway's NATS tells about tokens and models; None if it does not. unchecked: what is missing, and why."""

    manifest: Manifest | None = None
    revocations: list[Revocation] | None = None
    store_mark: StoreMark = field(default_factory=StoreMark)
    unchecked: list[str] = field(default_factory=list)

    async def revoked(self) -> list[Revocation]:
        return self.revocations or []


async def explain(settings: GatewaySettings, token: str, fabric: KnownByFabric, *, address: str) -> TokenReport:
    """address: the caller's, on which rules may depend. Raises SettingsError or PolicyError for faults of the settings."""
    log = make_log(io.StringIO())
    revocations = RevocationList(log)
    if fabric.revocations is not None:
        await revocations.refresh(fabric)
    issuers = trusted(settings.issuers, log)
    authenticator = Authenticator(issuers, revocations, FailureThrottle(1), time.time)
    header, claims = _parts(token)
    said = next((issuer for issuer in settings.issuers if issuer.issuer == claims.get("iss")), None)
    report = TokenReport(
        accepted=False, genuine=None, header=_shown(header, _HEADER), claims=_claims(claims, said),
        issuer="" if said is None else said.issuer, key="" if said is None else _source(said),
        unchecked=tuple(fabric.unchecked),
    )  # fmt: skip
    try:
        found = await authenticator.examine(f"Bearer {token}".encode())
    except Refusal as refusal:
        return _refused(report, refusal, settings, said)
    finally:
        await authenticator.close()
    return _accepted(report, found, settings, fabric.manifest, address)


async def ask_fabric(settings: GatewaySettings) -> KnownByFabric:
    """With the gateway's own credential. Never raises for a NATS that does not answer."""
    found = KnownByFabric()
    try:
        connection = await Connection.open(settings.nats.servers, Credential.load(settings.nats.credentials))
    except LacreError as exc:
        found.unchecked += [f"whether it is revoked: {exc}", "for which models: the manifest comes from NATS"]
        return found
    try:
        try:
            reader = RevocationReader(connection)
            found.revocations = await reader.read()
            found.store_mark = replace(reader.mark, lost=())
            if reader.mark.lost:
                found.unchecked.append("whether it is revoked: NATS lost its storage, and gateways refuse every token")
        except LacreError as exc:
            found.unchecked.append(f"whether it is revoked: {exc}")
        try:
            document = await connection.manifest()
            if document is None:
                raise SettingsError("no manifest was published")
            found.manifest = verify(document, settings.root, time.time()).manifest
        except LacreError as exc:
            found.unchecked.append(f"for which models: {exc}")
    finally:
        await connection.close()
    return found


def _parts(token: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The header and the claims, unverified; empty where they cannot be read."""
    parts = token.split(".")
    read: list[Mapping[str, Any]] = [{}, {}]
    if len(parts) == _PARTS:
        for number in range(2):
            with suppress(InvalidMessage):
                read[number] = read_object(parts[number])
    return read[0], read[1]


def _claims(claims: Mapping[str, Any], issuer: Issuer | None) -> dict[str, Any]:
    """The claims that are read: the standard ones that are there, and those that the settings name, there or not."""
    found = _shown(claims, _STANDARD)
    if issuer is not None:
        named = issuer.claims
        scopes = named.scopes or (("scp",) if "scp" in claims and "scope" not in claims else ("scope",))
        paths = (named.tenant, named.groups, scopes, named.plan)
        found |= {".".join(path): None for path in paths} | _shown(claims, paths)
    return found


def _shown(members: Mapping[str, Any], paths: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """Those members that are there, by their paths."""
    found = {}
    for path in paths:
        value: Any = members
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[".".join(path)] = value
    return found


def _refused(report: TokenReport, refusal: Refusal, settings: GatewaySettings, issuer: Issuer | None) -> TokenReport:
    part = refusal.noted.partition(":")[0]
    genuine = True if "reason" in refusal.details else None  # a caller is told more only if the signature holds
    return replace(
        report, genuine=False if part == "signature" else genuine, reason=refusal.noted, problem=refusal.problem.slug,
        expected=_expected(part, settings, issuer), remedy=refusal.problem.remedy,
    )  # fmt: skip


def _expected(part: str, settings: GatewaySettings, issuer: Issuer | None) -> str:
    """What the settings ask for, by the part of the token that does not fit. Empty if there is nothing to add."""
    if issuer is None:
        form = "a JWT in its compact form: header.payload.signature, with JSON objects whose members are unique"
        known = f"an issuer of the settings: {', '.join(each.issuer for each in settings.issuers)}"
        return {"authorization": form, "form": form, "iss": known}.get(part, "")
    if part in _CLAIMS:
        return f"{_CLAIMS[part]} in the claim {'.'.join(getattr(issuer.claims, part))}"
    lives = f"a token that has not expired and lives for at most {issuer.token_lifetime:.0f} s"
    return {
        "alg": f"an algorithm of this issuer: {', '.join(issuer.algorithms)}",
        "kid": f"a key that the issuer publishes ({_source(issuer)}), for the token's algorithm",
        "signature": f"the signature of a key that the issuer publishes ({_source(issuer)})",
        "aud": f"the audience {issuer.audience}",
        "exp": f"{lives}; clocks may differ by {issuer.leeway:.0f} s",
        "cnf": "a binding to a key by its thumbprint (`jkt`, RFC 9449), or none",
    }.get(part, "")


def _source(issuer: Issuer) -> str:
    if issuer.jwks is not None:
        return "`jwks` in the settings" if isinstance(issuer.jwks, dict) else str(issuer.jwks)
    return without_secrets(issuer.jwks_url) if issuer.jwks_url else f"found by discovery at {issuer.issuer}"


def _accepted(
    report: TokenReport, found: Examined, settings: GatewaySettings, manifest: Manifest | None, address: str
) -> TokenReport:
    """Raises PolicyError if the rules of the settings do not hold."""
    rules = RuleSet.load(settings.policies or shipped())
    who = found.principal
    plan, limits = _plan(rules.plans, who)
    now = round(time.time(), 3)
    asked = _Asked(rules.policies.would_allow, who, address, now)
    may = (*asked.models(manifest), *asked.administration(settings.gateway))
    return replace(
        report, accepted=True, genuine=True, principal=who, bound=found.bound, expires_at=found.expires_at,
        plan=plan, limits=limits, may=may,
    )  # fmt: skip


def _plan(plans: Plans, who: Principal) -> tuple[str | None, dict[str, dict[str, int]]]:
    """None for a plan that plans.toml does not have: each request is then refused."""
    plan = plans.plan_of(who.tenant, who.plan, who.subject, who.groups)
    if plan is None:
        return None, {}
    each = (("user", plan.user), ("tenant on this plan", plan.tenant), ("all on this plan", plan.everyone))
    return plan.name, {whose: said for whose, limits in each if (said := {kind.value: most for kind, most in limits.each()})}


@dataclass(frozen=True, slots=True)
class _Asked:
    """Asks the rules what a caller may do."""

    allowed: Callable[[AnyQuestion], bool]
    who: Principal
    address: str
    now: float

    def models(self, manifest: Manifest | None) -> Iterator[Permission]:
        """An action counts as allowed if the rules allow its smallest request with some KEM and shape."""
        pools: Mapping[str, Sequence[str]] = (
            {} if manifest is None else {name: tuple(pool.models) for name, pool in manifest.pools.items()}
        )
        for action in Action:
            for pool, models in pools.items():
                for model in models:
                    yield from self._model(action, pool, model)

    def _model(self, action: Action, pool: str, model: str) -> Iterator[Permission]:
        for kem in Kem:
            for shape in Shape:
                least = Question(self.who, action, pool, model, 1, 1, kem, shape, self.address, self.now)
                if self.allowed(least):
                    most = replace(least, max_tokens=MAX_TOKENS)
                    ceiling = None if self.allowed(most) else lowered(self.allowed, most, 1)
                    yield Permission(action.value, f"{pool}/{model}", ceiling)
                    return

    def administration(self, gateway: str) -> Iterator[Permission]:
        for action in AdminAction:
            if self.allowed(AdminQuestion(self.who, action, gateway, self.address, self.now)):
                yield Permission(action.value, gateway)
