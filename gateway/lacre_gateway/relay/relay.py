"""The path of one sealed request. `relay` reads like the list in DESIGN section 3.

Rules:
- A caller is known before a byte of the body is read. If the request announces its length, policy decides after reading only
  its header. Bytes of bodies are counted while they are held (see `budget.in_flight`).
- Nothing here can open anything. Frames are forwarded byte for byte as they arrive; frames that arrive together leave together.
- An error before the first byte of an answer becomes a problem document (see `failures`). After it, the answer ends without its
  seal's final chunk. It ends properly if its worker may be lost, so that the client counts that, and by an abort otherwise.
- A request that ends before its answer does is cancelled at the worker.
- The intent is durable before the first byte of the answer leaves, and the answer's header proves it. The receipt that settles
  the request is chosen after the answer has left (see `settlement`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from dataclasses import field, replace
from typing import Final

from lacre import problems
from lacre.jose.jws import b64u
from lacre.runtime.records import record
from lacre.trust.manifest import Pool
from lacre.wire.header import MAX_HEADER, MAX_SEALED_REQUEST, SealedHeader, inspect_request
from lacre.wire.outer import POOL
from lacre_fabric.logs import places
from lacre_fabric.work.contract import Dispatch, FabricError, Work, WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.grants import Grant
from lacre_fabric.work.settlement_keys import SettlementKey
from lacre_gateway.audit.entries import Intent
from lacre_gateway.auth.tokens import Access, Principal
from lacre_gateway.budget.fields import fields
from lacre_gateway.budget.holds import BudgetRefused, Exhausted, Hold
from lacre_gateway.budget.in_flight import LimitExceeded, Reservation
from lacre_gateway.budget.settlement import Claim
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.exchange import Attended, ClientGone, Exchange, Stalled
from lacre_gateway.http.headers import OuterHeaders
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.cedar import Decision
from lacre_gateway.policy.denial import denied, lowered, usable
from lacre_gateway.policy.question import Question
from lacre_gateway.relay.failures import CALLERS_FAULT, FAILURES, CountedRequest, WorkerRefused, may_be_lost, refusal_for
from lacre_gateway.relay.pools import pool_for
from lacre_gateway.relay.trail import Trail

_POOL: Final = POOL.encode()
# bytes of frames that arrived together and leave together: as much as a server takes without waiting
_TOGETHER: Final = 64 * 1024
_LEAST_QUEUE: Final = 1.0  # seconds in the queue, however long earlier steps took: a free worker takes some milliseconds
_CANCEL_LIMIT: Final = 2.0  # seconds for a cancellation; the worker also stops by itself when its credit runs out


class SealedEndpoint:
    """`POST /v1/sealed`. Its connection is `lacre_gateway.http.connection`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def serve(self, exchange: Exchange) -> None:
        """Does the work for one request, and answers it. Raises a fault of the gateway after it was answered."""
        try:
            with CountedRequest(self._gateway.metrics, exchange):
                await relay(self._gateway, exchange)
        except ClientGone:
            return
        except FAILURES as exc:
            if exchange.started:
                await _break_off(exchange, exc)
                return
            # No variable for the refusal: it may be `exc`, whose traceback has this frame, and the two would keep each other.
            if refusal_for(exc).problem is problems.INTERNAL:
                self._gateway.log.error("request failed", request_id=exchange.request_id, **places(exc))
            await exchange.refuse(refusal_for(exc))
        # a fault of the gateway: its connection logs the place, the caller learns only that it happened
        except Exception as exc:
            if exchange.started:  # the request may be what kills its worker
                await _break_off(exchange, exc)
            else:
                await exchange.refuse(Refusal(problems.INTERNAL))
            raise


async def _break_off(exchange: Exchange, error: Exception) -> None:
    """Ends a running answer: in order only if its worker may be lost."""
    if not may_be_lost(error):
        exchange.abort()
        return
    try:
        await exchange.give_up()
    except Stalled:
        exchange.abort()


async def relay(gateway: Gateway, exchange: Exchange) -> None:
    """Raises every error that `failures` lists, before the first byte of the answer or after it."""
    access = await gateway.authenticator.authenticate(
        exchange.fields.authorization(), exchange.address, proof=exchange.fields.proof(), url=gateway.sealed_url
    )
    principal = access.principal
    exchange.known()
    if gateway.feed.ready:
        exchange.manifest = gateway.feed.manifest.version
    # A worker's refusal is charged for its pool alone: it must not keep callers from other pools.
    subject = (principal.issuer, principal.subject)
    of_pool = (*subject, exchange.fields.values.get(_POOL))
    for each in (subject, of_pool):
        gateway.refusals.check(each, exchange.address)
    try:
        await _permitted(gateway, exchange, access)
    except FAILURES as exc:
        if _is_callers(exc, exchange):
            gateway.refusals.refused(of_pool if isinstance(exc, WorkerRefused) else subject, exchange.address)
        raise


def _is_callers(error: Exception, exchange: Exchange) -> bool:
    """Whether the caller caused this refusal, so that it counts towards the caller's limit of refusals."""
    if exchange.started or isinstance(error, LimitExceeded):
        return False
    return refusal_for(error).problem.status in CALLERS_FAULT


async def _permitted(gateway: Gateway, exchange: Exchange, access: Access) -> None:
    """Serves the request of a known caller."""
    principal, limits = access.principal, gateway.settings.limits
    declared = exchange.fields.check_media()
    outer = exchange.fields.outer()
    subject = (principal.issuer, principal.subject)
    with gateway.limits.slot(subject), gateway.bodies.room(subject) as room:
        room.check(declared or 0)
        # Without an announced length, policy cannot decide before the body is whole.
        first = MAX_HEADER if declared is not None else MAX_SEALED_REQUEST + 1
        start = await exchange.sealed_start(room, limits.body_timeout, first)
        begun = _Begun(SealedHeader.parse(start), len(start) if declared is None else declared)
        del start
        request = await _understood(gateway, exchange, principal, outer, begun)
        exchange.routed(outer.pool, outer.model, str(outer.action))
        access.check_request(request.digest)
        request, decision = _decided(gateway, request)
        if not decision.allowed:
            with Trail(gateway, exchange, request.intent(decision)):
                raise denied(gateway.rules.would_allow, request.question, tuple(request.pool.models), decision.policies)
        sealed = await exchange.sealed_body(room)
        if len(sealed) != begun.size:
            raise Refusal(problems.INVALID_HEADERS, details={"header": "content-length"})
        inspect_request(sealed)
        asked = time.monotonic()
        hold = await _reserved(gateway, exchange, request, decision)
        if hold.ceilings is not request.ceilings:
            request = replace(request, ceilings=hold.ceilings)
        with Trail(gateway, exchange, request.intent(decision, hold), hold) as trail:
            if not gateway.audit.writable:
                await trail.durable()  # otherwise a worker could work for an answer that cannot be delivered
            key = gateway.settlement_keys.of(outer.pool, request.pool, request.key_id)
            work = request.work(gateway.settlement_keys.gateway, _grant(gateway, request), sealed, key)
            dispatch = await gateway.connected().dispatch(
                work, queue_limit=rest_of_queue(limits.queue_limit, time.monotonic() - asked)
            )
            del sealed, work  # megabytes, which an answer of minutes need not keep
            room.release()
            exchange.decided()
            try:
                with Attended(exchange, limits.longest_stream, _too_long):
                    last = await _forward(exchange, dispatch, trail)
            except BaseException:
                await _cancel(dispatch)
                raise
            finally:
                trail.claim = request.claim(dispatch.receipts, key)
            await exchange.end(last)


def _decided(gateway: Gateway, request: _Request) -> tuple[_Request, Decision]:
    """Decides on the request; if policy denies only the client's default ceiling, on one that it allows."""
    decision = gateway.rules.decide(request.question)
    if not decision.allowed:
        fewer = lowered(gateway.rules.would_allow, request.question, request.ceilings.floor)
        if fewer is not None:
            request = request.with_fewer(fewer)
            decision = gateway.rules.decide(request.question)
    return request, decision


def rest_of_queue(limit: float, waited: float) -> float:
    """Seconds that a request may still wait for a worker, of `limit`, after waiting `waited` seconds for its caller's budgets.

    A caller waits for both alike, and gets an answer before its own time limit ends.
    """
    return min(limit, max(_LEAST_QUEUE, limit - waited))


async def _reserved(gateway: Gateway, exchange: Exchange, request: _Request, decision: Decision) -> Hold:
    """In any case, the answer will say how far the caller's limits are used.

    Raises BudgetRefused, which is then recorded like a denial.
    """
    try:
        hold = await gateway.budgets.reserve(request.question.principal, request.question.model, request.ceilings)
    except BudgetRefused as refused:
        if isinstance(refused, Exhausted):
            exchange.limits = fields(refused.standings)
        with Trail(gateway, exchange, request.intent(decision)):
            raise
    exchange.limits = hold.fields(gateway.budgets.now())
    return hold


@record(frozen=True, slots=True)
class _Request:
    """A well-formed request whose pool can open it; not yet allowed. asked_tokens: the ceiling that the client sent, which in
    `question` and `ceilings` may be lower. key_id: of the key that it is sealed to. enc: base64url of the digest.
    """

    question: Question
    asked_tokens: int
    ceilings: Reservation
    pool: Pool
    key_id: int
    request_id: str
    digest: bytes
    enc: str
    affinity: bytes | None = field(default=None, repr=False)

    def with_fewer(self, max_tokens: int) -> _Request:
        """With this lower ceiling of output."""
        question, ceilings = replace(self.question, max_tokens=max_tokens), replace(self.ceilings, max_tokens=max_tokens)
        return replace(self, question=question, ceilings=ceilings)

    def intent(self, decision: Decision, hold: Hold | None = None) -> Intent:
        asked, who = self.question, self.question.principal
        return Intent(
            request_id=self.request_id,
            time=asked.time,
            subject=who.subject,
            tenant=who.tenant,
            issuer=who.issuer,
            jti=None if who.jti is None else hashlib.sha256(who.jti.encode()).hexdigest(),
            address=asked.address,
            pool=asked.pool,
            model=asked.model,
            action=str(asked.action),
            shape=str(asked.shape),
            kem=asked.kem.label,
            max_tokens=self.asked_tokens,
            sealed_bytes=asked.sealed_bytes,
            enc=self.enc,
            groups=who.groups,
            scopes=who.scopes,
            plan=who.plan,
            decision="allow" if decision.allowed else "deny",
            policies=decision.policies,
            policy_set=decision.policy_set,
            entities=decision.entities,
            reserved_prompt_tokens=None if hold is None else self.ceilings.max_prompt_tokens,
            reserved_tokens=None if hold is None else self.ceilings.max_tokens,
            reserved_money=None if hold is None else hold.reserved.money,
            lease=None if hold is None else hold.lease,
            limits=() if hold is None else hold.limits,
            allowed_tokens=None if asked.max_tokens == self.asked_tokens else asked.max_tokens,
            affinity=asked.affinity or None,
        )

    def work(self, gateway: str, grant: str, sealed: bytes, key: SettlementKey | None) -> Work:
        return Work(
            request_id=self.request_id,
            pool=self.question.pool,
            model=self.question.model,
            digest=self.digest,
            grant=grant,
            sealed=sealed,
            affinity=self.affinity,
            gateway=gateway,
            settlement="" if key is None else key.sealed,
        )

    def claim(self, receipts: tuple[Frame, ...], key: SettlementKey | None) -> Claim:
        return Claim(
            request_id=self.request_id,
            pool=self.question.pool,
            receipt_key=self.pool.receipt_key_of(self.key_id) or self.pool.receipt_key,
            enc=self.enc,
            reservation=self.ceilings,
            receipts=receipts,
            key=key,
        )


@record(frozen=True, slots=True)
class _Begun:
    """The known part of a sealed request before its body is whole. size: of all of it, in bytes."""

    header: SealedHeader
    size: int


async def _understood(
    gateway: Gateway, exchange: Exchange, principal: Principal, outer: OuterHeaders, begun: _Begun
) -> _Request:
    """`_inspected`; if the key is unknown, once more after reading the fabric, because a rotation may be very recent."""
    try:
        return _inspected(gateway, exchange, principal, outer, begun)
    except Refusal as refusal:
        if refusal.problem is not problems.UNKNOWN_KEY:
            raise
    await gateway.feed.catch_up()
    return _inspected(gateway, exchange, principal, outer, begun)


def _inspected(gateway: Gateway, exchange: Exchange, principal: Principal, outer: OuterHeaders, begun: _Begun) -> _Request:
    """Raises Refusal."""
    header, digest = begun.header, begun.header.digest
    question = Question(
        principal=principal,
        action=outer.action,
        pool=outer.pool,
        model=outer.model,
        max_tokens=outer.max_tokens,
        sealed_bytes=begun.size,
        kem=header.suite.kem,
        shape=outer.shape,
        address=exchange.address,
        time=round(gateway.clock(), 3),  # as in the audit log, so that the decision can be repeated
        affinity=outer.affinity is not None and gateway.rules.read("affinity"),
    )
    return _Request(
        question=question,
        asked_tokens=outer.max_tokens,
        ceilings=gateway.ceilings(outer, header, begun.size),
        pool=_pool(gateway, question, outer, header),
        key_id=header.key_id,
        request_id=exchange.request_id,
        digest=digest,
        enc=b64u(digest),
        affinity=outer.affinity,
    )


def _pool(gateway: Gateway, question: Question, outer: OuterHeaders, header: SealedHeader) -> Pool:
    """Raises Refusal. For an unknown model it names those that this caller may use."""
    try:
        return pool_for(gateway.feed, outer, header, gateway.clock())
    except Refusal as refusal:
        models = refusal.details.get("models")
        if not isinstance(models, tuple):
            raise
        details = usable(gateway.rules.would_allow, question, models)
        raise Refusal(refusal.problem, details=details) from refusal


def _grant(gateway: Gateway, request: _Request) -> str:
    """The worker's permission. It names neither subject nor tenant, only pseudonyms of this hour."""
    now = gateway.clock()
    asked = request.question
    return Grant(
        jti=request.request_id,
        iat=now,
        exp=now + gateway.settings.limits.grant_lifetime,
        pool=asked.pool,
        model=asked.model,
        action=str(asked.action),
        shape=str(asked.shape),
        max_tokens=request.ceilings.max_tokens,
        max_prompt_tokens=request.ceilings.max_prompt_tokens,
        features=(),
        fair=gateway.pseudonyms.of(asked.principal, now),
        enc=request.enc,
    ).sign(gateway.signer)


async def _forward(exchange: Exchange, dispatch: Dispatch, trail: Trail) -> list[bytes]:
    """Returns when the worker said that the answer is whole, with the pieces to send with its end.

    Raises WorkerRefused, FabricError, AuditUnavailable or Stalled.
    """
    pieces: list[bytes] = []
    size = 0
    while True:
        frame = await dispatch.next()
        if frame.kind is FrameKind.DATA:
            pieces += [frame.payload, *dispatch.more(_TOGETHER - size - len(frame.payload))]
            size = sum(map(len, pieces))
        elif frame.kind is FrameKind.ERROR and not pieces:
            raise WorkerRefused(frame.payload)
        if not exchange.started:
            await exchange.begin(await trail.proof())
        if frame.kind is FrameKind.USAGE:
            return pieces
        if frame.kind is FrameKind.DATA and dispatch.ready and size < _TOGETHER:
            continue
        await exchange.write(pieces)
        await dispatch.consumed(size)
        pieces, size = [], 0
        if frame.kind is FrameKind.ERROR:
            raise WorkerRefused(frame.payload)
        del frame  # a record has up to 16 KiB, and the next one may take long


def _too_long() -> WorkerLost:
    """No lease of streams is kept longer."""
    return WorkerLost("the answer took longer than limits.longest_stream")


async def _cancel(dispatch: Dispatch) -> None:
    """Tries to cancel; the worker also stops by itself when its credit is not renewed."""
    with contextlib.suppress(FabricError, TimeoutError):
        async with asyncio.timeout(_CANCEL_LIMIT):
            await dispatch.cancel()
