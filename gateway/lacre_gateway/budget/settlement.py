"""Settles requests by their receipts, verified in batches, without delaying requests.

Rules:
- A request is settled by the newest receipt that the pool signed for it: the final one, or if the stream broke, the last one on
  a beat. A receipt that is not the pool's, or is for another request, proves nothing, and an older one may count.
- A receipt that the pool did sign and that claims more than the grant settles nothing, and no older one counts. The worker
  broke its grant, so its claims are refused.
- No claim is lost: even if one of a batch fails, or the thread does, each claim gets one verdict.
- Signatures are checked in a thread, all waiting ones together: the event loop goes on forwarding.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from lacre.errors import LacreError
from lacre.evidence.receipts import Receipt
from lacre.runtime import tasks
from lacre_fabric.logs import Log
from lacre_fabric.native.json_bytes import read_object
from lacre_gateway.budget.in_flight import Reservation

# Checked in one go. A signature takes some 0.1 ms, so this bounds the delay of an entry.
MAX_BATCH: Final = 256
# Seconds that a claim waits for others. No request waits for it, and going to the thread and back costs more than a signature.
_LINGER: Final = 0.025

_CLOSE_LIMIT: Final = 10.0  # seconds: 256 claims take 25 ms, and thousands of them a second or so


class ReceiptFault(StrEnum):
    """Why a receipt was refused."""

    NOT_THE_POOLS = "not-by-the-pool"
    OTHER_REQUEST = "for-another-request"
    ABOVE_GRANT = "above-the-grant"


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's claim of a request's usage. tokens: its receipts, the newest last. enc: base64url of the request's digest."""

    request_id: str
    pool: str
    receipt_key: bytes
    enc: str
    reservation: Reservation
    tokens: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """receipt: the one that settles the request; None leaves it without one. token: the same, as signed. refused: why the
    newest receipt was refused.
    """

    receipt: Receipt | None = None
    refused: ReceiptFault | None = None
    token: bytes | None = field(default=None, repr=False)


def judge(claim: Claim) -> Verdict:
    """Decides from the claim alone."""
    refused: ReceiptFault | None = None
    for token in reversed(claim.tokens):
        try:
            receipt = Receipt.verify(token.decode("ascii", "replace"), claim.receipt_key, read_object)
        except LacreError:
            refused = refused or ReceiptFault.NOT_THE_POOLS
            continue
        if receipt.enc != claim.enc:
            refused = refused or ReceiptFault.OTHER_REQUEST
            continue
        within = claim.reservation.covers(receipt.prompt_tokens, receipt.completion_tokens)
        if not within or receipt.cached_tokens > receipt.prompt_tokens:
            return Verdict(refused=ReceiptFault.ABOVE_GRANT)
        return Verdict(receipt, refused, token)
    return Verdict(refused=refused)


_Waiting = tuple[Claim, Callable[[Verdict], None]]


class Settlement:
    """Takes claims and reports each one's verdict a little later. Used on the event loop; closed by `close`."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[object] | None = None
        self.batches = 0

    def settle(self, claim: Claim, then: Callable[[Verdict], None]) -> None:
        """Returns at once; `then` is called on the event loop."""
        self._waiting.append((claim, then))
        if self._task is None or self._task.done():
            self._task = tasks.detach("settlement", self._drain())

    async def close(self) -> None:
        """Every claim so far has its verdict when this returns. Claims that a thread does not judge in time are judged here."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_CLOSE_LIMIT)
            await tasks.end(self._task)
        while self._waiting:
            batch = self._next_batch()
            self._tell(batch, _judge_all([claim for claim, _ in batch]))

    async def _drain(self) -> None:
        await asyncio.sleep(_LINGER)
        while self._waiting:
            batch = self._next_batch()
            claims = [claim for claim, _ in batch]
            try:
                verdicts = await asyncio.to_thread(_judge_all, claims)
            except asyncio.CancelledError:
                self._waiting.extendleft(reversed(batch))
                raise
            except RuntimeError as exc:  # the system has no more threads
                tasks.failed("settlement", exc)
                verdicts = _judge_all(claims)
            self._tell(batch, verdicts)

    def _next_batch(self) -> list[_Waiting]:
        return [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]

    def _tell(self, batch: Sequence[_Waiting], verdicts: Sequence[Verdict]) -> None:
        self.batches += 1
        for (claim, then), verdict in zip(batch, verdicts, strict=True):
            if verdict.refused is not None:
                where = {"request_id": claim.request_id, "pool": claim.pool}
                self._log.warning("receipt refused", **where, reason=verdict.refused.value)
            try:
                then(verdict)
            except Exception as exc:  # noqa: BLE001 - one request's fault must not cost the others of its batch their verdicts
                tasks.failed("settlement", exc)


def _judge_all(claims: Sequence[Claim]) -> list[Verdict]:
    return [_judged(claim) for claim in claims]


def _judged(claim: Claim) -> Verdict:
    try:
        return judge(claim)
    except Exception as exc:  # noqa: BLE001 - an unreadable receipt proves nothing, and affects no other claim
        tasks.failed("settlement", exc)
        return Verdict(refused=ReceiptFault.NOT_THE_POOLS)
