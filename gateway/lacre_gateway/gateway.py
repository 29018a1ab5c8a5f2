"""What one gateway process holds while it runs. It belongs to the app; a request's own state is in its `Exchange`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.receipts import units
from lacre.jose.dpop import plain_url
from lacre.jose.jws import raw_public_key
from lacre.runtime.listening import Door
from lacre.wire.header import SEALED_PATH, SealedHeader
from lacre.wire.padding import SMALLEST
from lacre_fabric.logs import Log
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.work.contract import FabricUnavailable, GatewayFabric
from lacre_fabric.work.revocations import Revocation
from lacre_gateway.audit.entries import UNRECORDED, Event
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.pseudonyms import Pseudonyms
from lacre_gateway.auth.revocation import RevocationList, revocation
from lacre_gateway.auth.throttle import FailureThrottle, RefusalThrottle
from lacre_gateway.auth.tokens import Authenticator
from lacre_gateway.budget.in_flight import BodyBytes, RequestLimits, Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.settlement import Settlement
from lacre_gateway.http.headers import Action, OuterHeaders
from lacre_gateway.observe.metrics import Metrics
from lacre_gateway.observe.tracing import Tracer
from lacre_gateway.policy.live import LiveRules, Status
from lacre_gateway.policy.rules import shipped
from lacre_gateway.settings import GatewaySettings

ORDINARY: Final = 4  # bytes of a token in ordinary text; JSON and HTTP around it, and padding, have bytes besides


@dataclass(slots=True)
class Gateway:
    """The parts of a running gateway. fabric: None until it is connected. ending: set when it is to drain and end. clock:
    seconds since the epoch. sealed_url: where clients send sealed requests, as their proofs name it. doors: of the listeners
    that serve it, by name.
    """  # fmt: skip

    settings: GatewaySettings
    authenticator: Authenticator
    revocations: RevocationList
    rules: LiveRules
    limits: RequestLimits
    bodies: BodyBytes
    refusals: RefusalThrottle
    budgets: Ledger
    audit: AuditLog
    feed: ManifestFeed
    key: Ed25519PrivateKey
    pseudonyms: Pseudonyms
    settlement: Settlement
    metrics: Metrics
    tracer: Tracer | None
    log: Log
    clock: Callable[[], float]
    sealed_url: str
    fabric: GatewayFabric | None = None
    doors: dict[str, Door] = field(default_factory=dict)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def draining(self) -> bool:
        return self.ending.is_set()

    def drain(self) -> None:
        """Begins the end of this process: it is not ready any more, and goes when its streams have finished. Idempotent."""
        self.ending.set()

    async def close(self) -> None:
        """Waits until what was served is settled and on disk. Nothing may be served any more."""
        await self.revocations.close()
        await self.authenticator.close()
        self.refusals.close()
        await self.settlement.close()
        await self.budgets.close()
        await self.audit.close()
        if self.tracer is not None:
            await self.tracer.close()

    async def reload(self, actor: str | None = None) -> Status:
        """Puts the rules that are on the disk to work. actor: `<tenant>/<subject>` of who asked. Raises PolicyError."""
        return await self.rules.reload(self.audit.append, actor)

    async def revoke(
        self, *, jti: str | None = None, subject: str | None = None, issuer: str | None = None, until: float | None = None
    ) -> Revocation:
        """Has a token, or all that a subject was issued until now, refused everywhere: here at once, elsewhere within a second.

        As `revocation.revocation` says. Raises UsageError or FabricUnavailable.
        """
        revoked = revocation(self.settings.issuers, jti=jti, subject=subject, issuer=issuer, until=until, now=self.clock())
        await self.connected().revoke(revoked)
        self.revocations.add(revoked)
        return revoked

    def tell_unrecorded(self, count: int) -> None:
        """One entry a minute says how many requests were refused past their callers' limits of refusals."""
        self.metrics.unrecorded(count)
        self.audit.append(Event(time=round(self.clock(), 3), event=UNRECORDED, count=count))

    def connected(self) -> GatewayFabric:
        """Raises FabricUnavailable."""
        if self.fabric is None:
            raise FabricUnavailable("the gateway is not connected to its message fabric yet")
        return self.fabric

    def ceilings(self, outer: OuterHeaders, header: SealedHeader, sealed_bytes: int) -> Reservation:
        """What a request may use. A token of a prompt is at least a byte of what is sealed: JSON and HTTP put more bytes about
        it than a chat template adds tokens. Of a request below the least padded length these may be too few, and its whole size
        counts. The worker refuses what is more. Of the action `http`, bytes are counted and no tokens.
        """
        model, action, max_tokens = outer.model, outer.action, outer.max_tokens
        if action is Action.HTTP:
            return Reservation(max_prompt_tokens=units(sealed_bytes), max_tokens=max_tokens)
        configured = self.settings.models.get(model)
        room = header.room(sealed_bytes)
        padded = room >= SMALLEST
        bound = room if padded else sealed_bytes
        prompt = bound if configured is None else min(configured.context, bound)
        enough = bound // ORDINARY if padded else None
        return Reservation(max_prompt_tokens=prompt, max_tokens=max_tokens, shrinks=True, enough=enough)

    def missing(self) -> dict[str, str]:
        """What is still missing before requests can be served, and who can help; empty when nothing is."""
        missing = {}
        if not self.feed.ready:
            missing["manifest"] = "none that is valid now: publish one with `lacre manifest publish`"
        elif self.feed.manifest.gateway_key != raw_public_key(self.key):
            missing["signing_key"] = "not the one in the manifest: workers will refuse every grant"
        if self.fabric is None or not self.fabric.connected:
            missing["fabric"] = "not connected to NATS"
        elif not self.revocations.current:
            missing["revocations"] = "cannot be read from NATS, so nobody is let in: see the log"
        elif not self.budgets.writable:
            missing["budgets"] = "NATS takes no writes of budgets: run `lacre fabric check`"
        if not self.authenticator.able:
            missing["issuers"] = "no issuer's keys could be fetched, so nobody can be let in: see the log"
        if not self.audit.writable:
            missing["audit"] = "the audit log cannot be written: free space where it stands"
        if self.draining:
            missing["draining"] = "this process is about to end: ask another one"
        return missing


def build(
    settings: GatewaySettings,
    key: Ed25519PrivateKey,
    log: Log,
    fetch: Callable[[], Awaitable[bytes | None]],
    clock: Callable[[], float] = time.time,
) -> Gateway:
    """Everything but the fabric. Reads policies and key sets, and opens the audit log. Raises SettingsError.

    key: what grants and audit checkpoints are signed with. fetch: where the feed gets the manifest document from; the feed is
    not started, and neither is what fetches issuers' keys and revocations.
    Called on the event loop, which the audit log reports to.
    """
    limits = settings.limits
    issuers = trusted(settings.issuers, log)
    revocations = RevocationList(log, clock)
    rules = LiveRules(settings.policies or shipped(), log=log, clock=clock)
    metrics = Metrics()
    requests = RequestLimits(in_flight=limits.requests_in_flight, concurrent=limits.concurrent_per_subject)
    gateway = Gateway(
        settings=settings,
        authenticator=Authenticator(issuers, revocations, FailureThrottle(limits.failed_auth_per_minute), clock),
        revocations=revocations,
        rules=rules,
        limits=requests,
        bodies=BodyBytes(total=limits.body_bytes, each=limits.body_bytes_per_subject),
        refusals=RefusalThrottle(limits.refused_per_minute, limits.refused_per_address, clock),
        budgets=Ledger(lambda: rules.current.plans, settings.instance, log, longest=limits.longest_stream, clock=clock),
        feed=ManifestFeed(fetch, settings.root, memory=memory_in(settings.memory), clock=clock),
        key=key,
        pseudonyms=Pseudonyms(key),
        settlement=Settlement(log),
        metrics=metrics,
        tracer=None if settings.tracing is None else Tracer(settings.tracing, settings.instance),
        log=log,
        clock=clock,
        sealed_url=plain_url(settings.public_url + SEALED_PATH),
        # Last: nothing after it can fail and leave its threads behind.
        audit=AuditLog(
            settings.audit,
            key,
            settings.audit_origin,
            log=log,
            policy_set=rules.status.policy_set,
            clock=clock,
            observe=metrics.committed,
            under_way=lambda: requests.running,
        ),
    )
    gateway.refusals.report = gateway.tell_unrecorded
    return gateway
