"""The state of one running gateway process. It belongs to the app; a request's own state is in its `Exchange`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import UsageError
from lacre.evidence.receipts import units
from lacre.jose.dpop import plain_url
from lacre.jose.jws import raw_public_key
from lacre.runtime.listening import Door
from lacre.trust.manifest import Manifest, fingerprint
from lacre.wire.header import SEALED_PATH, SealedHeader
from lacre.wire.outer import MAX_LENS_LAYERS, MAX_LENS_TOKENS, MAX_PARTS
from lacre.wire.padding import SMALLEST
from lacre_fabric.logs import Log
from lacre_fabric.native.ed25519 import Signer
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.work.contract import FabricUnavailable, GatewayFabric
from lacre_fabric.work.revocations import Revocation
from lacre_fabric.work.settlement_keys import SettlementKeys
from lacre_gateway.audit.entries import KEYS_ROTATED, MANIFEST, RESET, REVOKED, TOPPED_UP, UNRECORDED, Event
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.pseudonyms import Pseudonyms
from lacre_gateway.auth.revocation import RevocationList, revocation
from lacre_gateway.auth.throttle import FailureThrottle, RefusalThrottle
from lacre_gateway.auth.tokens import Authenticator
from lacre_gateway.budget.additions import MAX_ADDITIONS, Approver
from lacre_gateway.budget.alerts import BudgetAlerts
from lacre_gateway.budget.callers import BudgetScope
from lacre_gateway.budget.fitting import LEAST_OUTPUT
from lacre_gateway.budget.in_flight import BodyBytes, RequestLimits, Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.settlement import Settlement
from lacre_gateway.budget.webhook import WebhookSender
from lacre_gateway.http.address_limit import AddressLimit
from lacre_gateway.http.headers import Action, OuterHeaders
from lacre_gateway.http.line_limit import LineLimit
from lacre_gateway.observe.metrics import Metrics
from lacre_gateway.observe.queues import REMEDY as QUEUES_REMEDY
from lacre_gateway.observe.queues import Queues
from lacre_gateway.observe.tracing import Tracer
from lacre_gateway.policy.live import LiveRules, Status
from lacre_gateway.settings import GatewayLimits, GatewaySettings, shipped

# Of an explanation: how often its prompt is computed, and how many states of layers are read. A state costs a prompt's token.
_RUNS: Final = {Action.EXPLAIN: (MAX_PARTS + 1, 0), Action.LENS: (MAX_PARTS + 2, MAX_LENS_TOKENS * MAX_LENS_LAYERS)}
_LOWERED: Final = frozenset({Action.CHAT, Action.COMPLETE})  # their answers can end anywhere, with `length`
MAX_REVOKED: Final = 16  # revocations of one read with an event each; above it, one event counts them
ORDINARY: Final = 4  # bytes of a token in ordinary text; JSON, HTTP and padding add more bytes


@dataclass(frozen=True, slots=True)
class Changes:
    """changed: the tables and keys that took over. restart: those in the file that count only after a restart."""

    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


class ReloadsSettings(Protocol):
    """See `admin.reloading.SettingsReload`. restart: as in `Changes`. refused: why newer settings were; empty if none were."""

    restart: tuple[str, ...]
    refused: str

    async def reload(self, actor: str | None = None) -> Changes: ...


@dataclass(slots=True)
class Gateway:
    """The parts of a running gateway. fabric: None until it is connected. ending: set when it is to drain and end. clock:
    seconds since the epoch. sealed_url: where clients send sealed requests, as their proofs name it. doors: of its listeners,
    by name. calls: the limits of calls of its apps. reloading: replaces settings, if they came from a file.
    key: signs grants and checkpoints; signer: does so for grants; keys: all that it has.
    """  # fmt: skip

    settings: GatewaySettings
    authenticator: Authenticator
    revocations: RevocationList
    rules: LiveRules
    limits: RequestLimits
    bodies: BodyBytes
    refusals: RefusalThrottle
    lines: LineLimit
    budgets: Ledger
    audit: AuditLog
    feed: ManifestFeed
    key: Ed25519PrivateKey
    pseudonyms: Pseudonyms
    settlement: Settlement
    settlement_keys: SettlementKeys
    metrics: Metrics
    tracer: Tracer | None
    webhook: WebhookSender | None
    log: Log
    clock: Callable[[], float]
    sealed_url: str
    fabric: GatewayFabric | None = None
    queues: Queues = field(init=False)
    signer: Signer = field(init=False, repr=False)
    doors: dict[str, Door] = field(default_factory=dict)
    calls: list[AddressLimit] = field(default_factory=list)
    reloading: ReloadsSettings | None = None
    keys: Sequence[Ed25519PrivateKey] = ()
    _lacking: bytes = b""
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.signer = Signer(self.key)
        self.queues = Queues(self.log, self.connected, self._places)
        self.revocations.report = self.tell_revoked
        self.feed.report = self.tell_manifest

    def _places(self) -> list[tuple[str, str]]:
        """The queues that this gateway publishes to first: pool and region."""
        pools = self.feed.manifest.pools if self.feed.ready else ()
        return [(pool, self.settings.nats.region) for pool in pools]

    @property
    def draining(self) -> bool:
        return self.ending.is_set()

    def drain(self) -> None:
        """Begins the end of this process: it is no longer ready, and ends when its streams have finished. Idempotent.

        Clients reuse no connection from here on.
        """
        self.ending.set()
        for door in self.doors.values():
            door.draining = True

    async def close(self) -> None:
        """Waits until all served requests are settled and on disk. It must serve nothing from here on."""
        await self.revocations.close()
        await self.authenticator.close()
        self.refusals.close()
        self.lines.close()
        self.settlement.close()
        await self.budgets.close()
        await self.audit.close()
        if self.webhook is not None:
            await self.webhook.close()
        if self.tracer is not None:
            await self.tracer.close()

    def choose_key(self, manifest: Manifest) -> None:
        """Signs with the key that the manifest names, if this gateway has it.

        Otherwise it keeps the present one, which the manifest may still accept.
        """
        due = next((key for key in self.keys if raw_public_key(key) == manifest.gateway_key), None)
        self.budgets.approver.use(due or self.key, manifest.gateway_keys)
        if due is None:
            if self._lacking != manifest.gateway_key:
                remedy = "copy the publisher's gateway/grant.pem to `signing_key`"
                self.log.warning("signing key missing", reason="the manifest names a newer one", remedy=remedy)
            self._lacking = manifest.gateway_key
            return
        if raw_public_key(self.key) != manifest.gateway_key:
            self.key, self.signer, self.pseudonyms = due, Signer(due), Pseudonyms(due)
            self.log.info("signing key replaced")
        if self.audit.public != manifest.gateway_key:
            self.audit.rotate(key=due)

    def apply(self, limits: GatewayLimits) -> None:
        """Uses new limits from the next request on. Those that are read for each request are in `settings`."""
        self.limits.set(in_flight=limits.requests_in_flight, concurrent=limits.concurrent_per_subject)
        self.bodies.set(total=limits.body_bytes, each=limits.body_bytes_per_subject)
        self.refusals.set(limits.refused_per_minute, limits.refused_per_address)
        self.authenticator.set_failures(limits.failed_auth_per_minute)
        for calls in self.calls:
            calls.ceiling = limits.calls_per_address

    async def reload(self, actor: str | None = None) -> Status:
        """Activates the rules that are on the disk. actor: `<tenant>/<subject>` of the caller. Raises PolicyError."""
        return await self.rules.reload(self.audit.append, actor)

    async def revoke(
        self,
        *,
        jti: str | None = None,
        subject: str | None = None,
        issuer: str | None = None,
        until: float | None = None,
        actor: str | None = None,
    ) -> Revocation:
        """Revokes a token, or all that a subject was issued until now: here at once, at other gateways within a second.

        As `revocation.revocation` says. actor: `<tenant>/<subject>` of the caller, for the audit log. Raises UsageError or
        FabricUnavailable.
        """
        revoked = revocation(self.settings.issuers, jti=jti, subject=subject, issuer=issuer, until=until, now=self.clock())
        await self.connected().revoke(revoked)
        self.revocations.add(revoked)
        self.audit.append(Event(time=round(self.clock(), 3), event=REVOKED, actor=actor, target=revoked.key))
        return revoked

    async def change_budget(
        self, scope: BudgetScope, kind: LimitKind, amount: int | None, number: str, actor: str
    ) -> tuple[int, int]:
        """Raises a limit for the rest of its window, as `Ledger.change`. Returns by how much, and the window.

        actor: `<tenant>/<subject>` of the caller, for the audit log. Raises UsageError or FabricUnavailable.
        """
        added, window = await self.budgets.change(scope, kind, amount, number)
        if added is None:
            raise UsageError(f"this limit was already raised {MAX_ADDITIONS} times in its window: change plans.toml")
        event = RESET if amount is None else TOPPED_UP
        target = f"{scope.name}/{kind.value}@{window}"
        self.audit.append(Event(time=round(self.clock(), 3), event=event, actor=actor, target=target, count=added))
        return added, window

    def tell_revoked(self, keys: Sequence[str]) -> None:
        """Records revocations that others made, as this gateway learns of them. keys: digests of tokens or subjects."""
        if len(keys) > MAX_REVOKED:
            self.audit.append(Event(time=round(self.clock(), 3), event=REVOKED, count=len(keys)))
            return
        for key in keys:
            self.audit.append(Event(time=round(self.clock(), 3), event=REVOKED, target=key))

    def tell_manifest(self, before: Manifest, now: Manifest) -> None:
        """Records a newer manifest, and which public keys it changed. Signs with the key that it names."""
        self.choose_key(now)
        digest = hashlib.sha256(self.feed.document).hexdigest()
        self.audit.append(Event(time=round(self.clock(), 3), event=MANIFEST, target=digest, count=now.version))
        for target in changed_keys(before, now):
            self.audit.append(Event(time=round(self.clock(), 3), event=KEYS_ROTATED, target=target, count=now.version))

    def tell_unrecorded(self, count: int) -> None:
        """Records once a minute how many requests were refused after their callers had used up their limits of refusals."""
        self.metrics.unrecorded(count)
        self.audit.append(Event(time=round(self.clock(), 3), event=UNRECORDED, count=count))

    def connected(self) -> GatewayFabric:
        """Raises FabricUnavailable."""
        if self.fabric is None:
            raise FabricUnavailable("the gateway is not connected to its message fabric yet")
        return self.fabric

    def ceilings(self, outer: OuterHeaders, header: SealedHeader, sealed_bytes: int) -> Reservation:
        """The most that a request may use. A prompt token takes at least one byte of the request, and JSON and HTTP add more
        bytes than a chat template adds tokens. Below the least padded length these may be too few, so the whole size counts.
        The worker refuses longer prompts. For the action `http`, bytes count instead of tokens. The action `explain` computes
        the prompt once whole and once without each part, each time with an answer of at most `max_tokens` behind it. The action
        `lens` reads it once more, and each layer of each token. A default ceiling of the actions `chat` and `complete` may be
        lowered.
        """
        model, action, max_tokens = outer.model, outer.action, outer.max_tokens
        if action is Action.HTTP:
            return Reservation(max_prompt_tokens=units(sealed_bytes), max_tokens=max_tokens)
        configured = self.settings.models.get(model)
        room = header.room(sealed_bytes)
        padded = room >= SMALLEST
        bound = room if padded else sealed_bytes
        runs, views = _RUNS.get(action, (1, 0))
        answer = max_tokens if action in _RUNS else 0
        prompt = bound + answer if configured is None else min(configured.context, bound + answer)
        enough = runs * (bound // ORDINARY + answer) + views if padded else None
        return Reservation(
            max_prompt_tokens=runs * prompt + views,
            max_tokens=max_tokens,
            shrinks=True,
            enough=enough,
            least_tokens=LEAST_OUTPUT if outer.is_default and action in _LOWERED else None,
        )

    def missing(self) -> dict[str, str]:
        """The parts that are missing before requests can be served, and who can help; empty if none is."""
        missing = {}
        if not self.feed.ready:
            missing["manifest"] = "no valid manifest: publish one with `lacre manifest publish`"
        elif raw_public_key(self.key) not in self.feed.manifest.gateway_keys:
            missing["signing_key"] = "not the key in the manifest: workers will refuse every grant"
        if self.fabric is None or not self.fabric.connected:
            missing["fabric"] = "not connected to NATS"
        elif self.revocations.lost:
            lost = ", ".join(self.revocations.lost)
            missing["stores"] = f"NATS lost {lost}: restore them from a backup, then run `lacre state settle`"
        elif not self.revocations.current:
            missing["revocations"] = "cannot be read from NATS, so every request is refused: see the log"
        elif not self.budgets.writable:
            missing["budgets"] = "NATS accepts no writes of budgets: run `lacre fabric check`"
        if "fabric" not in missing and not self.queues.served:
            missing["queues"] = f"NATS has no queue for {', '.join(sorted(self.queues.lost))}: {QUEUES_REMEDY}"
        if not self.authenticator.able:
            missing["issuers"] = "no issuer's keys could be fetched, so every request is refused: see the log"
        if not self.audit.writable:
            missing["audit"] = "the audit log cannot be written: free space on its disk"
        if self.draining:
            missing["draining"] = "this process is about to end: ask another one"
        return missing


def changed_keys(before: Manifest, now: Manifest) -> list[str]:
    """What a newer manifest has other keys for: `gateway`, `pool/<name>`, `receipts/<name>`."""
    changed = [] if before.gateway_key == now.gateway_key else ["gateway"]
    for name in sorted(before.pools.keys() | now.pools.keys()):
        old, new = before.pools.get(name), now.pools.get(name)
        if (old and {fingerprint(key.config) for key in old.keys}) != (new and {fingerprint(key.config) for key in new.keys}):
            changed.append(f"pool/{name}")
        if (old and old.receipt_key) != (new and new.receipt_key):
            changed.append(f"receipts/{name}")
    return changed


def build(
    settings: GatewaySettings,
    key: Ed25519PrivateKey,
    log: Log,
    fetch: Callable[[], Awaitable[bytes | None]],
    clock: Callable[[], float] = time.time,
    *,
    others: Sequence[Ed25519PrivateKey] = (),
) -> Gateway:
    """Builds everything except the fabric. Reads policies and key sets, and opens the audit log. Raises SettingsError.

    key: signs grants and audit checkpoints; others: may have to, see `Gateway.choose_key`. fetch: returns the manifest document
    for the feed. This starts neither the feed nor the fetching of issuers' keys and revocations. Called on the event loop,
    which the audit log reports to.
    """
    limits = settings.limits
    issuers = trusted(settings.issuers, log)
    revocations = RevocationList(log, clock)
    rules = LiveRules(settings.policies or shipped(), log=log, clock=clock)
    metrics = Metrics()
    budgets = Ledger(
        lambda: rules.current.plans, settings.instance, log, longest=limits.longest_stream, approver=Approver(key), clock=clock
    )
    # By the ledger's time, which is the message server's: receivers reject signatures of a clock that is off.
    webhook = None if settings.alerts is None else WebhookSender(settings.alerts, log, budgets.now)
    requests = RequestLimits(in_flight=limits.requests_in_flight, concurrent=limits.concurrent_per_subject)
    gateway = Gateway(
        settings=settings,
        authenticator=Authenticator(issuers, revocations, FailureThrottle(limits.failed_auth_per_minute), clock),
        revocations=revocations,
        rules=rules,
        limits=requests,
        bodies=BodyBytes(total=limits.body_bytes, each=limits.body_bytes_per_subject),
        lines=LineLimit(log, clock),
        refusals=RefusalThrottle(limits.refused_per_minute, limits.refused_per_address, clock),
        budgets=budgets,
        feed=ManifestFeed(fetch, settings.root, memory=memory_in(settings.memory), clock=clock),
        key=key,
        keys=(key, *others),
        pseudonyms=Pseudonyms(key),
        settlement=Settlement(log),
        settlement_keys=SettlementKeys(settings.instance),
        metrics=metrics,
        tracer=None if settings.tracing is None else Tracer(settings.tracing, settings.instance),
        log=log,
        clock=clock,
        webhook=webhook,
        sealed_url=plain_url(settings.public_url + SEALED_PATH),
        # Last: nothing after it can fail and leave its threads running.
        audit=AuditLog(
            settings.audit,
            key,
            settings.audit_origin,
            others=others,
            log=log,
            policy_set=rules.status.policy_set,
            clock=clock,
            observe=metrics.committed,
            under_way=lambda: requests.running,
        ),
    )
    gateway.refusals.report = gateway.tell_unrecorded
    if webhook is not None and settings.alerts is not None:
        kinds = [LimitKind(name) for name in settings.alerts.limits]
        budgets.alerts = BudgetAlerts(webhook.send, kinds, settings.instance, lambda: rules.current.plans.currency)
    return gateway
