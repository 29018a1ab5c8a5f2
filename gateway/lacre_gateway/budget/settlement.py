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
- A receipt with the right MAC under the request's own settlement key counts as signed (`lacre_fabric.work.settlement_keys`).
  Only workers of its pool have that key. If the MAC is missing or wrong, the signature decides.
- One claim in `SAMPLED`, at random, has all its signatures verified. That finds a worker whose receipts nobody else could
  verify. Such a receipt is refused.
- Each claim gets one verdict, even if judging it fails, and a fault in one costs no other its verdict.
- A MAC takes 2 µs and a signature some 60, less than the way to a thread and back. A claim has few receipts, of bounded length
  (`lacre_fabric.work.gateway_stream`).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Final, Literal

from lacre.errors import InvalidSignature, LacreError
from lacre.evidence.receipts import Receipt
from lacre.jose.ed25519 import SIGNATURE_BYTES
from lacre.runtime import tasks
from lacre.runtime.records import record
from lacre_fabric.logs import Log
from lacre_fabric.native.ed25519 import verifies
from lacre_fabric.native.json_bytes import read_object
from lacre_fabric.work.frames import Frame
from lacre_fabric.work.settlement_keys import SettlementKey
from lacre_gateway.budget.in_flight import Reservation

AT_ONCE: Final = 50  # claims in one turn of the loop: some milliseconds
SAMPLED: Final = 64  # of so many claims, the signatures of one are verified: a microsecond of each request
_REMEDY: Final = "find the worker that sent it: nobody else could verify its receipts"
_FABRIC: Final = "the messages were altered, or a worker has a wrong key: signatures decide meanwhile"


class ReceiptFault(StrEnum):
    """Why a receipt was refused."""

    NOT_THE_POOLS = "not-by-the-pool"
    OTHER_REQUEST = "for-another-request"
    ABOVE_GRANT = "above-the-grant"


# How one receipt was checked, or why its MAC was worth nothing. Plain text, because a member of an enumeration takes two calls
# of Python more to count.
ReceiptCheck = Literal["mac", "signature", "wrong-mac", "mac-without-signature"]
WRONG_MAC: Final = "wrong-mac"
UNSIGNED: Final = "mac-without-signature"
_BY_MAC: Final[tuple[ReceiptCheck, ...]] = ("mac",)
_BY_SIGNATURE: Final[tuple[ReceiptCheck, ...]] = ("signature",)


@record(frozen=True, slots=True)
class Claim:
    """A worker's claim of a request's usage. receipts: the frames that carry them, the newest last. enc: base64url of the
    request's digest. key: of their MACs.
    """

    request_id: str
    pool: str
    receipt_key: bytes
    enc: str
    reservation: Reservation
    receipts: tuple[Frame, ...] = field(repr=False)
    key: SettlementKey | None = field(default=None, repr=False)


@record(frozen=True, slots=True)
class Verdict:
    """receipt: the one that settles the request; None leaves it without one. token: the same, as signed. refused: why the
    newest receipt was refused. checks: the faults of MACs, and at last how the receipt that counts was checked.
    """

    receipt: Receipt | None = None
    refused: ReceiptFault | None = None
    token: bytes | None = field(default=None, repr=False)
    checks: tuple[ReceiptCheck, ...] = ()


def judge(claim: Claim, *, sampled: bool = True) -> Verdict:
    """Decides from the claim alone. sampled: whether to verify all signatures."""
    refused: ReceiptFault | None = None
    checks: tuple[ReceiptCheck, ...] = ()
    for frame in reversed(claim.receipts):
        token, by_mac = frame.payload, False
        if claim.key is not None and frame.mac:
            by_mac = hmac.compare_digest(frame.mac, claim.key.mac(token))
            if not by_mac:
                checks = (*checks, WRONG_MAC)
        check = _by_length if by_mac and not sampled else verifies
        try:
            receipt = Receipt.verify(token.decode("ascii", "replace"), claim.receipt_key, read_object, check)
        except LacreError as exc:
            if by_mac and isinstance(exc, InvalidSignature):
                checks = (*checks, UNSIGNED)
            refused = refused or ReceiptFault.NOT_THE_POOLS
            continue
        if receipt.enc != claim.enc:
            refused = refused or ReceiptFault.OTHER_REQUEST
            continue
        within = claim.reservation.covers(receipt.prompt_tokens, receipt.completion_tokens)
        if not within or receipt.cached_tokens > receipt.prompt_tokens:
            return Verdict(refused=ReceiptFault.ABOVE_GRANT, checks=checks)
        return Verdict(receipt, refused, token, checks + (_BY_MAC if by_mac else _BY_SIGNATURE))
    return Verdict(refused=refused, checks=checks)


def _by_length(_public: bytes, signature: bytes, _signed: bytes) -> bool:
    """In place of `verifies`, for a receipt whose MAC holds."""
    return len(signature) == SIGNATURE_BYTES


def _drawn() -> int:
    """After how many claims the next one is sampled: no worker can tell which one."""
    return 1 + secrets.randbelow(2 * SAMPLED - 1)


class Settlement:
    """Reports the verdict on each claim. Used on the event loop."""

    def __init__(self, log: Log, draw: Callable[[], int] = _drawn) -> None:
        """draw: the number of the next claim whose signatures are verified, counted from 1."""
        self._log = log
        self._draw = draw
        self._unsampled = draw()
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
        self._unsampled -= 1
        if sampled := self._unsampled <= 0:
            self._unsampled = self._draw()
        verdict = _judged(claim, sampled)
        if verdict.refused is not None or len(verdict.checks) > 1:
            self._tell(claim, verdict)
        try:
            then(verdict)
        except Exception as exc:  # noqa: BLE001 - the request is over: its own path has nothing left to do with this
            tasks.failed("settlement", exc)

    def _tell(self, claim: Claim, verdict: Verdict) -> None:
        if verdict.refused is not None:
            self._log.warning("receipt refused", request_id=claim.request_id, pool=claim.pool, reason=verdict.refused.value)
        if UNSIGNED in verdict.checks:
            self._log.error("receipt unsigned", request_id=claim.request_id, pool=claim.pool, remedy=_REMEDY)
        key = claim.key
        if key is not None and not key.doubted and WRONG_MAC in verdict.checks:
            key.doubted = True  # once for each key, so twice in ten minutes at most for each key of a pool
            self._log.warning("receipt mac wrong", request_id=claim.request_id, pool=claim.pool, remedy=_FABRIC)


def _judged(claim: Claim, sampled: bool) -> Verdict:
    try:
        return judge(claim, sampled=sampled)
    except Exception as exc:  # noqa: BLE001 - an unreadable receipt proves nothing, and affects no other claim
        tasks.failed("settlement", exc)
        return Verdict(refused=ReceiptFault.NOT_THE_POOLS)
