"""What settles a request: which receipt counts, which is refused, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre_fabric.logs import make_log
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.settlement import Claim, ReceiptFault, Settlement, Verdict, judge
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.stage import Stage

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ENC = b64u(bytes(32))


def receipt(completion: int, *, prompt: int = 5, enc: str = ENC) -> Receipt:
    return Receipt(enc, "sha256:0", prompt, 0, completion, 1.0, 2.0, False)


def token(completion: int, *, key: Ed25519PrivateKey = KEY, **members: Any) -> bytes:
    return receipt(completion, **members).sign(key).encode()


def claim(*tokens: bytes) -> Claim:
    reservation = Reservation(max_prompt_tokens=100, max_tokens=10)
    return Claim("r1", "default", KEY.public_key().public_bytes_raw(), ENC, reservation, tokens)


FORGED = token(9, key=OTHER_KEY)
STRANGE = token(9, enc=b64u(b"1" * 32))


@pytest.mark.parametrize(
    ("tokens", "settled", "refused"),
    [
        ((), None, None),
        ((token(1), token(2), token(3)), 3, None),
        ((token(10, prompt=100),), 10, None),
        ((token(11),), None, ReceiptFault.ABOVE_GRANT),
        ((token(1, prompt=101),), None, ReceiptFault.ABOVE_GRANT),
        # The pool's own word above the grant: an older one does not stand in for it.
        ((token(3), token(11)), None, ReceiptFault.ABOVE_GRANT),
        ((token(3), FORGED), 3, ReceiptFault.NOT_THE_POOLS),
        ((token(3), STRANGE), 3, ReceiptFault.OTHER_REQUEST),
        ((token(3), STRANGE, FORGED, b""), 3, ReceiptFault.NOT_THE_POOLS),
        ((FORGED, STRANGE), None, ReceiptFault.OTHER_REQUEST),
        ((b"\xff" * 4000,), None, ReceiptFault.NOT_THE_POOLS),
        ((token(11), FORGED), None, ReceiptFault.ABOVE_GRANT),  # a forged one does not hide it
    ],
)
def test_which_receipt_counts(tokens: tuple[bytes, ...], settled: int | None, refused: ReceiptFault | None) -> None:
    verdict = judge(claim(*tokens))
    assert (verdict.receipt.completion_tokens if verdict.receipt else None, verdict.refused) == (settled, refused)


FORGED_BEAT = receipt(7).sign(OTHER_KEY).encode()


@pytest.mark.parametrize(
    ("beats", "tokens", "refused"),
    [
        (({"completion_tokens": 3}, {"completion_tokens": 5}), 5, None),
        # A beat that proves nothing leaves the one before.
        (({"completion_tokens": 3}, FORGED_BEAT, b"", b"no receipt"), 3, "not-by-the-pool"),
    ],
)
async def test_broken_answer_is_settled_on_the_last_beat(
    beats: tuple[Any, ...], tokens: int, refused: str | None, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    worker.script = Script(beats=beats, ending="error:x")
    await stage.post(client)
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["unreceipted"], outcome["completion_tokens"]) == ("broken", False, tokens)
    assert outcome["refused_receipt"] == refused


async def test_above_the_grant_is_not_settled_at_all(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """The answer is whole, and the client gets it; what the worker wants to be paid for it is refused."""
    worker.script = Script(beats=({"completion_tokens": 3},), usage={"completion_tokens": 257})
    assert await ask(stage, client)
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["unreceipted"], outcome["completion_tokens"]) == ("answered", True, None)
    assert outcome["refused_receipt"] == "above-the-grant"
    [warning] = [entry for entry in stage.logged() if entry["level"] == "warning"]
    assert (warning["event"], warning["reason"]) == ("receipt refused", "above-the-grant")


async def ask(stage: Stage, client: httpx2.AsyncClient) -> bool:
    body, _, opener = stage.seal(key=2)
    response = await stage.post(client, body=body)
    return opened(opener, response.content) == b"".join(PIECES)


@contextlib.asynccontextmanager
async def no_thread_free() -> AsyncIterator[threading.Event]:
    """Every thread that could check a signature is busy until the event is set."""
    go = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(go.wait)) for _ in range(64)]
    await asyncio.sleep(0.05)
    try:
        yield go
    finally:
        go.set()
        await asyncio.gather(*busy)


async def test_no_answer_waits_and_many_are_settled_at_once(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    async with no_thread_free() as go:
        assert all([await ask(stage, client) for _ in range(20)])
        kinds = [entry["kind"] for entry in await stage.trail(10)]
        assert kinds == ["intent"] * 20
        go.set()
        entries = await stage.trail(20)
    assert [entry["unreceipted"] for entry in entries if entry["kind"] == "outcome"] == [False] * 20
    assert stage.gateway.settlement.batches <= 2  # the first alone, and all that came meanwhile


async def test_closing_waits_for_what_is_not_settled_yet(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    async with no_thread_free() as go:
        assert await ask(stage, client)
        closing = asyncio.create_task(stage.gateway.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        go.set()
        await closing
    assert [entry["kind"] for entry in await stage.trail()] == ["intent", "outcome"]


class Told:
    """Claims that were settled, by their number, and what was told of each, in its order."""

    def __init__(self) -> None:
        self.settlement = Settlement(make_log(io.StringIO()))
        self.verdicts: dict[int, list[Verdict]] = {}

    def settle(self, number: int, settled: Claim, fails: bool = False) -> None:
        def then(verdict: Verdict) -> None:
            self.verdicts.setdefault(number, []).append(verdict)
            if fails:
                raise ZeroDivisionError

        self.settlement.settle(settled, then)

    def counts(self) -> list[int | None]:
        """The tokens of each verdict, in the order in which they were told."""
        told = [verdict for verdicts in self.verdicts.values() for verdict in verdicts]
        return [verdict.receipt.completion_tokens if verdict.receipt else None for verdict in told]


async def test_a_fault_in_one_claim_costs_no_other_its_verdict(caplog: pytest.LogCaptureFixture) -> None:
    """And they come in the order of the claims."""
    told = Told()
    for number in range(5):
        told.settle(number, claim(token(number + 1)), fails=number == 1)
    broken = dataclasses.replace(claim(token(3)), reservation=None)  # type: ignore[arg-type]  # a fault of ours, say
    told.settle(5, broken)
    await told.settlement.close()
    assert told.counts() == [1, 2, 3, 4, 5, None]
    assert told.verdicts[5] == [Verdict(refused=ReceiptFault.NOT_THE_POOLS)]
    assert caplog.messages == ["a try failed: settlement"] * 2


async def test_a_drain_that_is_cut_off_loses_nothing() -> None:
    told = Told()
    async with no_thread_free():
        for number in range(3):
            told.settle(number, claim(token(3)))
        await asyncio.sleep(0.05)  # they are on their way to a thread
        assert told.settlement._task is not None
        told.settlement._task.cancel()
        await asyncio.sleep(0.01)
        assert not told.verdicts
        await told.settlement.close()
    assert told.counts() == [3, 3, 3]


async def test_a_system_without_a_thread_to_give_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    asyncio.get_running_loop().set_default_executor(pool)
    told = Told()
    told.settle(0, claim(token(3)))
    await told.settlement.close()
    assert told.counts() == [3]
    assert caplog.messages == ["a try failed: settlement"]
