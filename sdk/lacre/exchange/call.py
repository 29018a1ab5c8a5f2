"""One sealed exchange, without any HTTP library: what to send, how to read the answer, what to do next.

Rules:
- A request leaves only after a trusted manifest named the key that it is sealed to. There is no plaintext fallback.
- Every attempt is a fresh seal. Nobody signs what a gateway says before the seal, so its advice can cause only one manifest
  refresh and one retry. `attempts` counts both.
- A request is not retried once part of its answer was delivered, or if running it twice does harm: see `lacre.exchange.retry`.
- The gateway proves with its answer that it recorded the request. Without that proof the client opens nothing of the answer.
- A worker's `#date` problem suggests a clock correction. It came sealed, and only the inner `date` uses it.
- Calls share only what belongs to the client. No error or answer of one call reveals anything of another.

`Sealing.exchange` and `Sealing.manifest` are generators of the steps in `lacre.exchange.steps`: they do no I/O.
"""

from __future__ import annotations

import contextlib
import email.utils
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import EllipsisType, MappingProxyType
from typing import Final

from lacre.errors import (
    Details,
    Expired,
    InvalidAudit,
    LacreError,
    NetworkError,
    RefusedError,
    SettingsError,
    TruncatedStream,
    UnsupportedSuite,
    UsageError,
)
from lacre.evidence import audit_proof, receipts
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts
from lacre.evidence.prices import TokenPrice, price_of
from lacre.evidence.receipts import Receipt
from lacre.evidence.verification import SealedTo, Signed, Verification
from lacre.exchange.affinity import affinity_of
from lacre.exchange.first_use import first_use
from lacre.exchange.model_paths import misdirected
from lacre.exchange.own_usage import OwnUsage, own_usage
from lacre.exchange.request import Plain, Prepared, is_repeatable, prepare
from lacre.exchange.retry import ENDURANCE, Retries, delay
from lacre.exchange.routing import CallRoute, pin_of
from lacre.exchange.scope import Scope
from lacre.exchange.sealed_answer import (
    MAX_PROBLEM,
    AnswerHead,
    GatewayRefusal,
    Opening,
    Trailers,
    check_sealed,
    problem_of,
    read_all,
)
from lacre.exchange.steps import Offload, Outer, Read, Renew, Send, Steps, Together, Wait, sent_bytes, sent_outer
from lacre.jose.jws import b64u
from lacre.problems import DATE, INVALID_TOKEN, PATH_NOT_ALLOWED, UNKNOWN_KEY, UNKNOWN_POOL, Problem, details
from lacre.runtime import forks
from lacre.trust.chain import Trusted
from lacre.trust.manifest import MAX_DOCUMENT, Manifest, ModelEntry, Pool, PoolKey
from lacre.trust.manifest_store import Memory, accept, sticky_key
from lacre.wire import bhttp, outer
from lacre.wire.header import AUTHORITY, MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, SEALED_PATH, Kem
from lacre.wire.ohttp import seal_request
from lacre.wire.padding import Shape, request_length, shape_named

ORIGIN: Final = f"https://{AUTHORITY}"
DEFAULT_KEMS: Final = (Kem.XWING,)
MANIFEST_PATH: Final = "/v1/manifest"
SALT_LIFETIME: Final = 3600.0  # seconds: the salt scopes the prefix cache, and is a pseudonym as long as it lives
# Seconds before a failed refresh is tried again, while the present manifest is still valid. Also between refreshes because a
# gateway names a newer version: nobody signs its word.
REFRESH_PAUSE: Final = 30.0
POOL_PAUSE: Final = 2.0  # seconds between looks for a pool that the manifest lacks: it may have been added a moment ago
# of a manifest's lifetime: the client fetches a new one then, so no request meets an expired manifest
REFRESH_BEFORE: Final = 0.5
_BEHIND: Final = (UNKNOWN_KEY, UNKNOWN_POOL)  # the gateway's manifest differs from the client's


@dataclass(slots=True)
class CallState:
    """What one call knows of itself, over all its attempts. Nothing in it is another call's, nor comes to be.

    mended: the causes that were mended already; none is tried twice. fetches: how many manifests the client had fetched when
    the call took its own. trusted, facts: None at first; facts: of the newest attempt.
    """

    plain: Plain
    retries: Retries
    scope: Scope
    route: CallRoute
    attempts: int = 0
    mended: set[Problem] = field(default_factory=set)
    trusted: Trusted | None = None
    fetches: int = 0
    facts: Facts | None = None

    @property
    def manifest(self) -> Manifest:
        if self.trusted is None:
            raise UsageError("there is no manifest yet: make a request or fetch the manifest first")
        return self.trusted.manifest


class Sealing:
    """State that the calls of one client share: the pinned root, the newest manifest and the present scope. Thread-safe.

    What belongs to one call is in its `CallState`. A forked child has a scope of its own.

    pool: the caller's choice; None: by the manifest's routes. kems, shape: what the caller accepts; if a manifest does not
    offer it, the call fails: there is no fallback. pin_models: a digest of a file, `sha256:…`, by the model's name: if the
    manifest names others, nothing is sent. retries: how often a request is sent again before any of its answer was delivered;
    None: as `lacre.exchange.retry` decides. resume: how often an answer that broke off later is resumed
    (`lacre.exchange.resume`), while it may have cost one worker at most. clock: seconds since the epoch.
    """

    def __init__(
        self,
        root: bytes,
        memory: Memory,
        *,
        pool: str | None = None,
        kems: Sequence[Kem] = DEFAULT_KEMS,
        shape: Shape = "pad",
        keep_identifying_fields: bool = False,
        pin_models: Mapping[str, str] = MappingProxyType({}),
        retries: int | None = 0,
        resume: int = 0,
        affinity: bool = True,
        prices: Mapping[str, TokenPrice] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self._memory = memory
        self._pool = pool
        self._prices = prices
        self._kems = tuple(kems)
        self._shape = shape_named(shape)
        self._pin_models = pin_models
        self._keep_identifying_fields = keep_identifying_fields
        self._retries = retries
        self.resume = resume
        self._affinity = affinity
        self._clock = clock
        self._lock = threading.Lock()
        self._trusted: Trusted | None = None
        self._fetched_at = 0.0
        self._missed_at = float("-inf")  # time of the last failed refresh
        self._fetches = 0
        self._doubted = False
        self._named = 0  # the highest version that a gateway named since the last fetch
        self._sticky = b""  # the key for routes; empty before the first manifest that has some
        self._scope = Scope(float("-inf"))
        self._last: Facts | None = None
        forks.watch(self)
        first_use()

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._scope, self._last = Scope(float("-inf")), None

    @property
    def verification(self) -> Verification:
        """The checks of the newest request; before the first request, those of the manifest, if there is one."""
        with self._lock:
            trusted, last = self._trusted, self._last
        checked = Verification(b64u(self.root), None if trusted is None else Signed.of(trusted, self._clock()))
        return checked if last is None else replace(last.verification, manifest=checked.manifest)

    def manifest(self) -> Steps[Manifest]:
        """The verified manifest; fetched if there is none or it is old."""
        try:
            yield from self._learn(ENDURANCE)
            return self._taken()[0].manifest
        except LacreError as exc:
            exc.verification = exc.verification or self._checked(None)
            raise

    def usage(self, retries: int | EllipsisType | None) -> Steps[OwnUsage]:
        """What the caller has used, as the gateway says. retries: as in `Overrides`."""
        return own_usage(self._retries if isinstance(retries, EllipsisType) else retries, self._clock)

    def exchange(self, plain: Plain, endurance: float = ENDURANCE, lost: int = 0) -> Steps[Opening | GatewayRefusal]:
        """Seals `plain` as often as it takes: once, and once more for a new key or a corrected clock.

        endurance: seconds to retry requests that did not run, if the caller set no number. lost: workers that this call may
        have cost already (see `lacre.exchange.retry`). A returned `Opening` has its head; the caller reads the rest and feeds
        it.
        """
        repeatable = is_repeatable(plain)
        asked = plain.overrides.retries
        tries = self._retries if isinstance(asked, EllipsisType) else asked
        retries = Retries.of(tries, repeatable=repeatable, endurance=endurance, clock=self._clock, lost=lost)
        call = CallState(plain, retries, self._scope_now(), CallRoute.of(plain, self._pool))
        try:
            return (yield from self._exchange(call))
        except LacreError as exc:
            if call.facts is not None:
                call.facts.tell(exc)
            exc.verification = exc.verification or self._checked(None)
            raise

    def _exchange(self, call: CallState) -> Steps[Opening | GatewayRefusal]:
        retries = call.retries
        while True:
            yield from self._learn(retries.rest)
            call.trusted, call.fetches = self._taken()
            if call.route.lacks_its_pool(call.manifest) and not 0 <= self._clock() - self._fetched_at < POOL_PAUSE:
                yield from self._refresh(call)
                call.trusted, call.fetches = self._taken()
            send, opening, sent = self._seal(call)
            try:
                refusal = yield from self._attempt(call, send, opening, sent)
            except (NetworkError, TruncatedStream) as exc:
                if (seconds := retries.after_failure(exc)) is None:
                    raise
                yield Wait(seconds)
                continue
            opening.facts.lost = retries.lost
            if refusal is None:
                if DATE in call.mended or not self._correct_clock(opening, call.scope):
                    return opening
                call.mended.add(DATE)
            elif call.route.moves_on(refusal.problem):
                continue
            elif refusal.problem in call.mended or not (yield from self._mended(call, refusal.problem)):
                if (seconds := retries.after_refusal(refusal.problem, refusal.retry_after)) is None:
                    opening.facts.lost = retries.lost
                    return refusal
                yield Wait(seconds)
            else:
                call.mended.add(refusal.problem)

    def _attempt(
        self, call: CallState, send: Send, opening: Opening, sent: Mapping[str, object]
    ) -> Steps[GatewayRefusal | None]:
        """None once the answer's head is there."""
        outer = sent_outer((yield send))
        opening.facts.request_id = outer.request_id
        self._named = max(self._named, outer.manifest or 0)
        if outer.status != 200:
            document = yield from read_all(MAX_PROBLEM)
            with contextlib.suppress(InvalidAudit):  # nobody signed the refusal either: a proof is kept if it holds
                opening.facts.audit = self._proof(outer, call.manifest, sent)
            problem = problem_of(outer, document)
            said: Details = details.read(document)
            if problem is PATH_NOT_ALLOWED:
                problem, said = misdirected(call.plain.method, call.plain.path.partition("?")[0])
            elif problem is INVALID_TOKEN and not said and outer.token_expires is not None:
                said = {"expired_at": outer.token_expires} if outer.token_expires <= self._clock() else said
            return GatewayRefusal(problem, outer.retry_after, opening.facts, said)
        check_sealed(outer)
        opening.facts.audit = yield from self._proved(call, outer, {**sent, "decision": "allow"})
        while not opening.ready:
            opening.feed(sent_bytes((yield Read())))
        return None

    def _mended(self, call: CallState, problem: Problem) -> Steps[bool]:
        """Whether the gateway's objection may be settled now."""
        if behind := problem in _BEHIND:
            yield from self._refresh(call)
        return behind or (problem is INVALID_TOKEN and (yield Renew()) is True)

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def delay(self, number: int) -> float:
        """Seconds before the next try to resume an answer."""
        return delay(number)

    def _learn(self, endurance: float) -> Steps[None]:
        """Makes sure that there is a valid manifest. All calls that need one share one fetch.

        While the present one is valid, the client asks once for a newer one, and pauses if that fails.
        """
        if not self._is_stale():
            return
        holds = self._still_holds()
        number, endurance = (0, 0.0) if holds else (self._retries, endurance)
        try:
            yield Together(self._is_stale, partial(self._fetch_manifest, endurance, number), endurance)
        except (NetworkError, RefusedError):
            if not holds:
                raise
            with self._lock:
                self._missed_at = self._clock()

    def _refresh(self, call: CallState, *, beside: bool = False) -> Steps[None]:
        """Fetches the manifest, unless that happened after the call took its own.

        beside: an answer waits for it, so it is tried only once; see `Together`.
        """
        endurance = 0.0 if beside else call.retries.rest
        fetch = partial(self._fetch_manifest, endurance, 0 if beside else self._retries)
        yield Together(lambda: self._fetches == call.fetches, fetch, endurance, beside=beside)

    def _fetch_manifest(self, endurance: float, number: int | None) -> Steps[None]:
        """number: of further tries; None: as `lacre.exchange.retry` decides."""
        retries = Retries.of(number, repeatable=True, endurance=endurance, clock=self._clock)
        while True:
            try:
                outer = sent_outer((yield Send("GET", MANIFEST_PATH)))
                # One byte over the limit, so that a document that is too long is noticed and not cut.
                document = yield from read_all(MAX_DOCUMENT + 1 if outer.status == 200 else MAX_PROBLEM)
            except NetworkError as exc:
                if (seconds := retries.after_failure(exc)) is None:
                    raise
            else:
                if outer.status == 200:
                    yield Offload(partial(self._accept, document))  # signatures, and a file that other processes lock
                    return
                problem = problem_of(outer, document)
                if (seconds := retries.after_refusal(problem, outer.retry_after)) is None:
                    refused = problem.exception(outer.retry_after, details.read(document))
                    refused.request_id = outer.request_id
                    raise refused
            yield Wait(seconds)

    def _accept(self, document: bytes) -> None:
        now = self._clock()
        trusted = accept(document, self.root, self._memory, now)
        key = self._sticky or sticky_key(self._memory) if trusted.manifest.routes else b""
        with self._lock:
            self._sticky = self._sticky or key  # threads may overtake
            if self._trusted is None or trusted.manifest.version >= self._trusted.manifest.version:  # threads may overtake
                self._trusted, self._fetched_at, self._doubted, self._named = trusted, now, False, 0
            self._fetches += 1

    def _proved(self, call: CallState, outer: Outer, sent: Mapping[str, object]) -> Steps[AuditProof]:
        """The gateway's proof that it recorded this request, and for which caller. Raises InvalidAudit.

        The gateway's key may have changed since the client learned the manifest. So the client fetches a newer one before it
        accuses the gateway.
        """
        try:
            return self._proof(outer, call.manifest, sent)
        except InvalidAudit as exc:
            self._doubted = True  # if it cannot be fetched now, the next call fetches it
            try:
                yield from self._refresh(call, beside=True)
            except (NetworkError, RefusedError):
                exc.remedy = (
                    "Ask again: the client then fetches the manifest first, because the gateway's key may have changed."
                )
                raise exc from None
            newest = self._taken()[0].manifest
            if newest.gateway_keys == call.manifest.gateway_keys:
                raise
        return self._proof(outer, newest, sent)

    def _proof(self, outer: Outer, manifest: Manifest, sent: Mapping[str, object]) -> AuditProof:
        return audit_proof.of_answer(outer.audit, manifest.gateway_keys, {**sent, **outer.speaks_for})

    def _is_stale(self) -> bool:
        with self._lock:
            if self._trusted is None or self._doubted:
                return True
            now = self._clock()
            if 0 <= now - self._missed_at < REFRESH_PAUSE and now < self._trusted.manifest.expires_at:
                return False
            if self._named > self._trusted.manifest.version and not 0 <= now - self._fetched_at < REFRESH_PAUSE:
                return True
            lifetime = self._trusted.manifest.expires_at - self._fetched_at
            return now >= self._fetched_at + lifetime * REFRESH_BEFORE

    def _still_holds(self) -> bool:
        with self._lock:
            trusted = None if self._doubted else self._trusted
        return trusted is not None and self._clock() < trusted.manifest.expires_at

    def _taken(self) -> tuple[Trusted, int]:
        """The newest manifest, and how many were fetched so far."""
        with self._lock:
            if self._trusted is None:
                raise UsageError("there is no manifest yet: make a request or fetch the manifest first")
            if self._clock() >= self._trusted.manifest.expires_at:
                raise Expired("the manifest has expired: the operator must run `lacre manifest publish`")
            return self._trusted, self._fetches

    def _seal(self, call: CallState) -> tuple[Send, Opening, Mapping[str, object]]:
        """What to send, what opens the answer, and what the gateway's audit entry must say of the request."""
        manifest = call.manifest
        (name, routed), pool = call.route.found(manifest, self._sticky, self._seals_to)
        key = self._choose(name, self._current(pool))
        if self._shape not in pool.shapes:
            taken = ", ".join(pool.shapes)
            raise SettingsError(f"pool {name!r} does not accept the shape {self._shape!r}: choose one of {taken}")
        kept = self._keep_identifying_fields
        prepared = prepare(call.plain, pool.models, keep_identifying_fields=kept, routed=routed)
        verify = self._verifier(pool, key, prepared, pin_of(self._pin_models, call.route.model, prepared.model))
        said = (
            (outer.POOL, name),
            (outer.MODEL, prepared.model),
            (outer.ACTION, prepared.action),
            (outer.CEILING, str(prepared.max_tokens)),
            (outer.SHAPE, self._shape),
        )
        padded_to = request_length if self._shape == "pad" else None
        # The gateway may lower a default but not raise it. So the inside has it as a bound, not as a copy.
        copies = tuple((outer.MOST if prepared.is_default and name == outer.CEILING else name, value) for name, value in said)
        body, header, opener = seal_request(
            key.config, bhttp.encode_request(self._inner(prepared, call.scope, copies), padded_to=padded_to)
        )
        outside = (*said, (outer.CEILING_IS_DEFAULT, outer.YES)) if prepared.is_default else said
        if self._affinity and (beginning := prepared.beginning) is not None:
            salt = call.scope.salt_of(call.plain.overrides.cache_scope)
            outside = (*outside, (outer.AFFINITY, affinity_of(salt, name, prepared.model, beginning)))
        headers = (*outside, ("content-type", MEDIA_TYPE_REQUEST), ("incremental", "?1"), ("accept", MEDIA_TYPE_RESPONSE))
        call.attempts += 1
        checked = self._checked(call.trusted, SealedTo.of(name, key))
        facts = Facts(header.suite.kem.label, self._shape, len(body), call.attempts, checked)
        facts.action, facts.pool, facts.model = prepared.action, name, prepared.model
        facts.price = price_of(self._prices, prepared.model)
        call.facts = self._last = facts

        sent = {
            "kind": "intent",
            "enc": b64u(header.digest),
            "pool": name,
            "model": prepared.model,
            "action": prepared.action,
            "max_tokens": prepared.max_tokens,
            "shape": self._shape,
            "kem": facts.kem,
            "sealed_bytes": len(body),
        }
        return (
            Send("POST", SEALED_PATH, headers, body, sealed=header.digest),
            Opening(opener, facts, partial(verify, header.digest)),
            sent,
        )

    def _verifier(
        self, pool: Pool, key: PoolKey, asked: Prepared, pin: str | None
    ) -> Callable[[bytes, AnswerHead, Trailers], Receipt]:
        """Makes the receipt of a whole answer, from the digest of the sealed request and what the answer said. It raises
        InvalidReceipt or WrongModel.

        Raises WrongModel if the manifest contradicts the caller's pin.
        """
        digests = receipts.digests_of(asked.model, pool.models.get(asked.model, ModelEntry()), pin)

        receipt_key = key.receipt_key or pool.receipt_key

        def verify(digest: bytes, head: AnswerHead, trailers: Trailers) -> Receipt:
            receipt = receipts.of_answer(trailers, receipt_key, digest, asked.max_tokens)
            ran = asked.action != "inspect" and head.status < 400  # an error may come from before the model
            receipts.check_model(receipt, asked.model, digests, ran=ran)
            return receipt

        return verify

    def _checked(self, trusted: Trusted | None, sealed_to: SealedTo | None = None) -> Verification:
        """trusted: the manifest of the call; the newest if the call has none yet. sealed_to: the key that it seals to."""
        with self._lock:
            trusted = trusted or self._trusted
        signed = None if trusted is None else Signed.of(trusted, self._clock())
        return Verification(b64u(self.root), signed, sealed_to)

    def _inner(self, prepared: Prepared, scope: Scope, outer: Sequence[tuple[str, str]]) -> bhttp.Request:
        plain = prepared.plain
        date = email.utils.formatdate(self._clock() + scope.offset, usegmt=True)
        own = (("date", date), ("lacre-cache-salt", scope.salt_of(plain.overrides.cache_scope)))
        return bhttp.Request(plain.method, "https", AUTHORITY, plain.path, (*plain.headers, *own, *outer), plain.content)

    def _current(self, pool: Pool) -> list[PoolKey]:
        return [key for key in pool.keys if key.not_after > self._clock()]

    def _seals_to(self, pool: Pool) -> bool:
        return self._shape in pool.shapes and any(key.config.kem in self._kems for key in self._current(pool))

    def _choose(self, pool: str, keys: Sequence[PoolKey]) -> PoolKey:
        for kem in self._kems:
            for key in keys:
                if key.config.kem is kem:
                    return key
        wanted = ", ".join(kem.label for kem in self._kems)
        raise UnsupportedSuite(f"pool {pool!r} has no current key for {wanted}: ask its operator, or accept another KEM")

    def _scope_now(self) -> Scope:
        """A new one each hour, and after the clock was turned back."""
        now = self._clock()
        with self._lock:
            if not 0 <= now - self._scope.since < SALT_LIFETIME:
                self._scope = Scope(now)
            return self._scope

    def _correct_clock(self, opening: Opening, scope: Scope) -> bool:
        """Whether the answer is the worker's `#date` problem with a usable date (RFC 9458 section 6.5.2)."""
        return opening.problem_type == DATE.type and scope.correct(opening.head.get("date"), self._clock())
