"""The node: pulls sealed requests, opens them, lets an ASGI app answer, and seals each piece as it is produced.

Rules:
- Nothing of a request is used before its grant is verified, over the exact bytes received, and the request is opened.
- No frame is sent before this attempt has claimed the request in the whole pool. An attempt that loses sends nothing. A local
  memory refuses a replay even if the fabric has forgotten it.
- The app is not called before the claim, except for actions that are harmless if done twice (`repeatable`). Those start while
  the claim is in progress, and are stopped if it is lost.
- A request that was delivered before is not run here: it may have crashed the earlier worker. The node reports it as lost, and
  whether the earlier worker had claimed it. The node takes the claim itself, so that no late claim succeeds.
- A withdrawn request is paid for as far as it came: the last frame is its receipt.
- Errors before opening are sent as a problem type, errors after it are sealed.
- Logs contain ids, counts and durations, never content.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import asgi, problems
from lacre.asgi.admission import ReplayMemory, check_date, sent_at
from lacre.errors import AppLost, Expired, InvalidSignature, LacreError, NewerFormat, UnknownKeyId
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.runtime import tasks
from lacre.trust.manifest import Manifest
from lacre.wire.header import SealedHeader
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import SHAPES, shape_named
from lacre_backend.node import grant_check
from lacre_backend.node.opened_keys import OpenedKeys
from lacre_backend.node.work_counts import WorkCounts
from lacre_fabric import logs
from lacre_fabric.native.json_bytes import write_object
from lacre_fabric.work.contract import BEAT, CLAIM_TTL, Cancelled, Delivery, FabricUnavailable, NoMoreWork, WorkerFabric
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.grants import Grant
from lacre_fabric.work.settlement_keys import SettlementKey

RECONNECT: Final = 1.0  # seconds between tries to pull while the fabric is unreachable
_ANSWER_END: Final = 2 * tasks.END_LIMIT  # seconds for a cancelled answer to end; its app has half of them
LEAVE: Final = 2 * _ANSWER_END  # seconds for cancelled requests at the end of a drain, including the messages to their gateways
# Seconds to retry a claim. A bucket has a new leader within nine; a gateway waits about ten for the first frame.
CLAIM_PATIENCE: Final = 8.0
CLAIM_AGAIN: Final = 0.2  # seconds between those retries
NO_MANIFEST: Final = 0.2  # seconds between checks for the first manifest

log = structlog.get_logger("lacre.node")


async def _nothing_newer() -> None:
    """For a manifest that nothing replaces."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's pool, and the keys with which it opens and signs.

    look_for_keys: loads new keys; called before a key id counts as unknown. receipt_keys: by the id of the key that a request
    is sealed to; `receipt_key` signs for the others. catch_up: reads the manifest again.
    """

    pool: str
    keys: Callable[[], Mapping[int, PrivateKey]]
    receipt_key: Ed25519PrivateKey = field(repr=False)
    manifest: Callable[[], Manifest]
    look_for_keys: Callable[[], bool] = lambda: False
    receipt_keys: Callable[[], Mapping[int, Ed25519PrivateKey]] = dict
    catch_up: Callable[[], Awaitable[None]] = _nothing_newer

    def receipts_of(self, key_id: int) -> Ed25519PrivateKey | None:
        """Signs receipts of requests for this key. None if the manifest names a receipt key that this worker does not have."""
        key = self.receipt_keys().get(key_id, self.receipt_key)
        pool = self.manifest().pools.get(self.pool)
        due = None if pool is None else pool.receipt_key_of(key_id)
        return key if due is None or due == raw_public_key(key) else None


class _Refused(Exception):
    """The request is refused. `problem` says why, and is sent unsealed."""

    def __init__(self, problem: problems.Problem) -> None:
        super().__init__(problem.slug)
        self.problem = problem


class _UnknownSigner(_Refused):
    """The grant is signed by no key of the manifest."""


class _Replayed(Exception):
    """Another attempt has or had the request. This one sends nothing."""


class Node:
    """Answers the sealed requests of one pool with an ASGI app.

    - app: answers opened requests. repeatable: actions that may start before the claim.
    - weighs: actions for which the app reports the number of sequences; others count as one.
    - clock: seconds since the epoch. claim_patience: seconds to retry a claim. counts: of the requests and their tokens.
    """

    def __init__(
        self,
        fabric: WorkerFabric,
        app: asgi.App,
        identity: Identity,
        *,
        repeatable: Collection[str] = (),
        weighs: Collection[str] = (),
        clock: Callable[[], float] = time.time,
        claim_patience: float = CLAIM_PATIENCE,
        counts: WorkCounts | None = None,
    ) -> None:
        self._counts = counts or WorkCounts()
        self._claim_patience = claim_patience
        self._fabric = fabric
        self._app = app
        self._identity = identity
        self._repeatable = frozenset(repeatable)
        self._weighs = frozenset(weighs)
        self._clock = clock
        self._seen = ReplayMemory(lifetime=CLAIM_TTL)
        self._settlement_keys = OpenedKeys(identity.pool)
        self._running: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Pulls and answers until cancelled. Requests in progress then continue until `drain` or `close`.

        It pulls nothing before its first manifest, because it could verify no grant. Other workers take that work.
        """
        while True:
            if not self._has_manifest():
                await asyncio.sleep(NO_MANIFEST)
                continue
            try:
                delivery = await self._fabric.pull()
                if self._weighs:
                    self._fabric.weigh(delivery, None)
            except NoMoreWork:
                await asyncio.Event().wait()  # until it is cancelled
            except FabricUnavailable as exc:
                log.warning("fabric.unavailable", reason=str(exc))
                await asyncio.sleep(RECONNECT)
                continue
            task = tasks.detach("request", self._serve(delivery))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _has_manifest(self) -> bool:
        try:
            self._identity.manifest()
        except LacreError:
            return False
        return True

    async def drain(self, limit: float) -> None:
        """Lets running requests finish for up to `limit` seconds. Then cancels them, and waits up to `LEAVE` seconds."""
        await self._fabric.drain()
        if self._running:
            await asyncio.wait(self._running, timeout=limit)
        await tasks.end(*self._running, limit=LEAVE)

    async def _serve(self, delivery: Delivery) -> None:
        began = time.monotonic()
        outcome = "failed"
        try:
            outcome = await self._work(delivery)
        except _Refused as refused:
            outcome = refused.problem.slug
            await _tell(delivery, refused.problem)
        except _Replayed:
            outcome = "replayed"
        except Cancelled:
            outcome = "cancelled"
        # The worker is healthy: the gateway must not take it for lost, and the client sends the request again
        except FabricUnavailable:
            outcome = "fabric-lost"
            await _tell(delivery, problems.BUSY)
        except asyncio.CancelledError:  # the end of a drain: tell the gateway instead of falling silent
            outcome = "drained"
            await _tell(delivery, problems.WORKER_LOST)
            raise
        except asgi.AppFailed as exc:
            if isinstance(exc.__cause__, AppLost):
                outcome = "app-lost"
                await _tell(delivery, problems.WORKER_LOST if exc.__cause__.begun else problems.BUSY)
                return
            log.error("app.failed", request_id=delivery.work.request_id, **logs.places(exc.__cause__ or exc))
            outcome = "app-failed"
            await _tell(delivery, problems.INTERNAL)
        except Exception:  # our own fault ends only this request; the gateway is told, and the log has the traceback
            await _tell(delivery, problems.INTERNAL)
            raise
        finally:
            try:
                await delivery.drop()
            finally:
                self._fabric.release(delivery)
            seconds = round(time.monotonic() - began, 3)
            log.info("work.done", request_id=delivery.work.request_id, outcome=outcome, seconds=seconds)

    async def _work(self, delivery: Delivery) -> str:
        grant = await self._granted(delivery)
        if delivery.again:
            raise _Refused(problems.UNCLAIMED if await self._claimed(delivery) else problems.WORKER_LOST)
        opened = self._open(delivery)
        if (signing := self._identity.receipts_of(opened.header.key_id)) is None:
            log.warning("receipt_key.missing", request_id=delivery.work.request_id, key_id=opened.header.key_id)
            raise _Refused(problems.UNKNOWN_KEY)  # the client would reject its receipt
        now = self._clock()
        digest = opened.header.digest
        if self._seen.has(digest, now):
            raise _Replayed
        refusal = check_date(opened, now, seen=self._seen)
        if refusal is None and not self._seen.add(digest, now, sent_at(opened)):
            raise _Replayed
        if self._weighs and grant.action not in self._weighs:
            self._fabric.weigh(delivery, 1)
        call = asgi.Call(
            request_id=grant.jti,
            model=grant.model,
            action=grant.action,
            max_tokens=grant.max_tokens,
            max_prompt_tokens=grant.max_prompt_tokens,
            features=frozenset(grant.features),
            fair=grant.fair,
            weigh=partial(self._weigh, asyncio.get_running_loop(), delivery),
        )
        work, key_id = delivery.work, opened.header.key_id
        settling = self._settlement_keys.find(work.settlement, work.gateway, key_id, self._identity.keys())
        receipts = _Receipts(signing, settling, grant, call.usage, now, self._clock)
        refusal = refusal or grant_check.check(opened, grant, now)
        if refusal is not None:
            await self._claim(delivery)
            receipt = receipts.sign(final=True)
            sent = receipt.encode()
            sealed = asgi.refuse(
                opened, refusal.status, refusal.body, refusal.media_type, refusal.headers, trailers=((TRAILER, receipt),)
            )
            await delivery.send(FrameKind.DATA, sealed)
            await delivery.send(FrameKind.USAGE, sent, receipts.mac(sent))
            return "refused-inside"
        with self._counts.counting(delivery.work.model, call.usage):
            await self._answer(delivery, opened, call, receipts)
        return "answered"

    def _weigh(self, loop: asyncio.AbstractEventLoop, delivery: Delivery, sequences: int) -> None:
        """The app calls it, from its own thread."""
        loop.call_soon_threadsafe(partial(self._fabric.weigh, delivery, sequences))

    async def _granted(self, delivery: Delivery) -> Grant:
        """Once more after reading the manifest, because the gateway's key may just have been replaced."""
        try:
            return self._verify_grant(delivery)
        except _UnknownSigner:
            before = self._identity.manifest()
            await self._identity.catch_up()
            if self._identity.manifest() is before:
                raise
        return self._verify_grant(delivery)

    def _verify_grant(self, delivery: Delivery) -> Grant:
        work = delivery.work
        try:
            manifest, now = self._identity.manifest(), self._clock()
            # Otherwise a fabric that withholds the next manifest would keep a withdrawn grant key alive
            if now >= manifest.expires_at:
                raise Expired("the manifest has expired, so its key no longer verifies grants")
            grant = Grant.verify(work.grant, manifest.gateway_keys, now)
        except InvalidSignature as exc:
            log.warning("grant.refused", request_id=work.request_id, kind=type(exc).__name__)
            raise _UnknownSigner(problems.INVALID_GRANT) from exc
        except LacreError as exc:
            why = {"reason": str(exc)} if isinstance(exc, NewerFormat) else {}  # it names the program to upgrade
            log.warning("grant.refused", request_id=work.request_id, kind=type(exc).__name__, **why)
            raise _Refused(problems.INVALID_GRANT) from exc
        try:
            digest = SealedHeader.parse(work.sealed).digest
        except LacreError as exc:
            raise _Refused(problems.INVALID_REQUEST) from exc
        # The fabric sets these fields of Work, so they prove nothing. The signature and the bytes do.
        expected = (self._identity.pool, b64u(digest), work.model)
        if (grant.pool, grant.enc, grant.model) != expected or grant.shape not in SHAPES:
            log.warning("grant.refused", request_id=work.request_id, kind="mismatch")
            raise _Refused(problems.INVALID_GRANT)
        return grant

    def _open(self, delivery: Delivery, *, look: bool = True) -> asgi.Opened:
        try:
            return asgi.open_sealed(delivery.work.sealed, self._identity.keys())
        except UnknownKeyId as exc:
            if look and self._identity.look_for_keys():
                return self._open(delivery, look=False)
            raise _Refused(problems.UNKNOWN_KEY) from exc
        except LacreError as exc:
            raise _Refused(problems.INVALID_REQUEST) from exc

    async def _answer(self, delivery: Delivery, opened: asgi.Opened, call: asgi.Call, receipts: _Receipts) -> None:
        """Streams the answer and sends beats. Stops at once if the gateway withdraws the request or another attempt claimed
        it.
        """
        claimed = asyncio.Event()
        streaming = tasks.spawn("answer", self._stream(delivery, opened, call, receipts, claimed))
        beating = tasks.spawn("claim and beats", self._claim_and_beat(delivery, receipts, claimed))
        withdrawn = tasks.spawn("withdrawal", delivery.cancelled.wait())
        try:
            await asyncio.wait({streaming, beating, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                await streaming
            elif beating.done():
                await beating
            else:
                raise Cancelled("the gateway withdrew the request")
        except Cancelled:
            await tasks.end(streaming, limit=_ANSWER_END)  # counts what it made until now
            if claimed.is_set():
                receipt = receipts.sign(final=True).encode()
                await delivery.stop(receipt, receipts.mac(receipt))
            raise
        finally:
            await tasks.end(streaming, beating, withdrawn, limit=_ANSWER_END, expected=(_Replayed,))

    async def _claim_and_beat(self, delivery: Delivery, receipts: _Receipts, claimed: asyncio.Event) -> None:
        """Claims, then sends the first beat at once: until a frame is sent, a claimed request of a dead worker looks like a
        queued one.

        Ends only by raising _Replayed or an error of sending.
        """
        await self._claim(delivery)
        claimed.set()
        await _beat(delivery, receipts)

    async def _claim(self, delivery: Delivery) -> None:
        """Raises _Replayed, or FabricUnavailable."""
        if not await self._claimed(delivery):
            raise _Replayed

    async def _claimed(self, delivery: Delivery) -> bool:
        """Whether this attempt has the request. While the claims bucket has no leader it retries, and the answer is computed
        meanwhile.
        """
        deadline = time.monotonic() + self._claim_patience
        while True:
            try:
                return await delivery.claim()
            except FabricUnavailable:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(CLAIM_AGAIN)

    async def _stream(
        self, delivery: Delivery, opened: asgi.Opened, call: asgi.Call, receipts: _Receipts, claimed: asyncio.Event
    ) -> None:
        final: list[str] = []

        def trailers() -> tuple[tuple[str, str], ...]:
            final.append(receipts.sign(final=True))
            return ((TRAILER, final[0]),)

        if call.action not in self._repeatable:
            await claimed.wait()
        shape = shape_named(receipts.grant.shape)
        try:
            async with aclosing(asgi.answer(self._app, opened, call, shape=shape, trailers=trailers)) as pieces:
                async for piece in pieces:
                    await claimed.wait()
                    await delivery.send(FrameKind.DATA, piece)
        except asgi.AppFailed:
            await claimed.wait()  # only the winner may report that
            raise
        receipt = final[0].encode()
        await delivery.send(FrameKind.USAGE, receipt, receipts.mac(receipt))


async def _tell(delivery: Delivery, problem: problems.Problem) -> None:
    """Ends the work with an error frame, if the gateway still listens."""
    with suppress(Cancelled, FabricUnavailable):
        await delivery.reject(problem.type)


@dataclass(frozen=True, slots=True)
class _Receipts:
    """Signs receipts of a call's usage so far. settling: of the MACs that go with them, if there is one."""

    key: Ed25519PrivateKey = field(repr=False)
    settling: SettlementKey | None = field(repr=False)
    grant: Grant
    usage: asgi.Usage
    start: float
    clock: Callable[[], float]

    def sign(self, *, final: bool) -> str:
        usage = self.usage
        return Receipt(
            enc=self.grant.enc,
            model=usage.model_digest,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            start=self.start,
            end=self.clock(),
            final=final,
        ).sign(self.key, write_object)

    def mac(self, receipt: bytes) -> bytes:
        return b"" if self.settling is None else self.settling.mac(receipt)


async def _beat(delivery: Delivery, receipts: _Receipts) -> None:
    """Ends only by raising an error of sending."""
    while True:
        receipt = receipts.sign(final=False).encode()
        await delivery.send(FrameKind.BEAT, receipt, receipts.mac(receipt))
        await asyncio.sleep(BEAT)
