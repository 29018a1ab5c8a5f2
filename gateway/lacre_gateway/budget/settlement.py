"""Settles requests by their receipts, after their ends.

Rules:
- A claim is judged in a later turn of the event loop than the one in which its answer ended. So the answer's last bytes leave
  first, also if other answers end in the same turn.
- One turn judges at most `AT_ONCE` claims, in their order: a thousand answers that end together delay nobody by much.
- `close` judges what still waits. It comes before budgets and audit log are closed, so none of it is lost.
- A request is settled by the newest receipt that the pool signed for it: the final one, or if the stream broke, the last one on
  a beat. A receipt that is not the pool's, or is for another request, proves nothing, and an older one may count.
- A receipt that the pool did sign and that claims more than the grant settles nothing, and no older one counts. The worker
  broke its grant, so its claims are refused.
- Each claim gets one verdict, even if judging it fails, and a fault in one costs no other its verdict.
- A signature takes some 60 µs, less than the way to a thread and back. A claim has few receipts, of bounded length
  (`lacre_fabric.work.gateway_stream`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Final

from lacre.errors import LacreError
from lacre.evidence.receipts import Receipt
from lacre.runtime import tasks
from lacre.runtime.records import record
from lacre_fabric.logs import Log
from lacre_fabric.native.ed25519 import verifies
from lacre_fabric.native.json_bytes import read_object
from lacre_gateway.budget.in_flight import Reservation

AT_ONCE: Final = 50  # claims in one turn of the loop: some milliseconds


class ReceiptFault(StrEnum):
    """Why a receipt was refused."""

    NOT_THE_POOLS = "not-by-the-pool"
    OTHER_REQUEST = "for-another-request"
    ABOVE_GRANT = "above-the-grant"


@record(frozen=True, slots=True)
class Claim:
    """A worker's claim of a request's usage. tokens: its receipts, the newest last. enc: base64url of the request's digest."""

    request_id: str
    pool: str
    receipt_key: bytes
    enc: str
    reservation: Reservation
    tokens: tuple[bytes, ...] = field(repr=False)


@record(frozen=True, slots=True)
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
            receipt = Receipt.verify(token.decode("ascii", "replace"), claim.receipt_key, read_object, verifies)
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


class Settlement:
    """Reports the verdict on each claim. Used on the event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: deque[tuple[Claim, Callable[[Verdict], None]]] = deque()
        self._due = 0  # of those, the ones that were here a turn ago: the last bytes of their answers have left
        self._next: asyncio.Handle | None = None
        self._closed = False

    def settle(self, claim: Claim, then: Callable[[Verdict], None]) -> None:
        """Calls `then` with the verdict in a later turn of the loop; once closed, at once."""
        self._waiting.append((claim, then))
        if self._closed:
            self.close()
        elif self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def close(self) -> None:
        """Judges all claims that wait, and later ones as they come: the loop may end before another turn."""
        self._closed = True
        while self._waiting:
            self._settle(*self._waiting.popleft())

    def _turn(self) -> None:
        now = min(AT_ONCE, self._due, len(self._waiting))
        self._due = len(self._waiting) - now
        self._next = asyncio.get_running_loop().call_soon(self._turn) if self._due else None
        for _ in range(now):
            self._settle(*self._waiting.popleft())

    def _settle(self, claim: Claim, then: Callable[[Verdict], None]) -> None:
        """Raises nothing."""
        verdict = _judged(claim)
        if verdict.refused is not None:
            self._log.warning("receipt refused", request_id=claim.request_id, pool=claim.pool, reason=verdict.refused.value)
        try:
            then(verdict)
        except Exception as exc:  # noqa: BLE001 - the request is over: its own path has nothing left to do with this
            tasks.failed("settlement", exc)


def _judged(claim: Claim) -> Verdict:
    try:
        return judge(claim)
    except Exception as exc:  # noqa: BLE001 - an unreadable receipt proves nothing, and affects no other claim
        tasks.failed("settlement", exc)
        return Verdict(refused=ReceiptFault.NOT_THE_POOLS)
