"""Settlement by MACs: which receipts need no signature, and when one is verified anyway."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.receipts import TYP, Receipt
from lacre.jose.jws import b64u, b64u_decode
from lacre_fabric.logs import make_log
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.settlement_keys import SettlementKey
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.settlement import SAMPLED, Claim, ReceiptFault, Settlement, Verdict, _drawn, judge

POOLS, OTHERS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ENC = b64u(bytes(32))
KEY = SettlementKey(bytearray(os.urandom(32)))
BY_MAC, SIGNED, WRONG, UNSIGNED = "mac", "signature", "wrong-mac", "mac-without-signature"
NOT_THE_POOLS, OTHER_REQUEST, ABOVE = ReceiptFault


def token(completion: int = 3, signer: Ed25519PrivateKey = POOLS, enc: str = ENC) -> bytes:
    return Receipt(enc, "sha256:0", 5, 0, completion, 1.0, 2.0, False).sign(signer).encode()


def sent(receipt: bytes, mac: bytes | None = None) -> Frame:
    """With the right MAC, or another."""
    return Frame("0" * 32, 0, FrameKind.BEAT, receipt, KEY.mac(receipt) if mac is None else mac)


def claim(*frames: Frame, key: SettlementKey | None = KEY) -> Claim:
    reservation = Reservation(max_prompt_tokens=100, max_tokens=10)
    return Claim("r1", "default", POOLS.public_key().public_bytes_raw(), ENC, reservation, frames, key)


def cut(receipt: bytes) -> bytes:
    """With a signature that is a byte short."""
    signed, _, signature = receipt.decode().rpartition(".")
    return f"{signed}.{b64u(b64u_decode(signature)[:-1])}".encode()


def spelled(receipt: bytes) -> bytes:
    """Under a header that means the same in another spelling, which the signature does not cover."""
    _, payload, signature = receipt.decode().split(".")
    header = b64u(json.dumps({"alg": "EdDSA", "typ": TYP}).encode())
    return f"{header}.{payload}.{signature}".encode()


UNREADABLE = b64u(b'{"enc":"x"}')
FORGED, JUNK = token(9, OTHERS), b"a.b.c"
RANDOM = os.urandom(32)


@pytest.mark.parametrize(
    ("frames", "settled", "refused", "checks"),
    [
        ([sent(token(1)), sent(token(2))], 2, None, [BY_MAC]),
        ([sent(FORGED)], 9, None, [BY_MAC]),  # its signature is not looked at, unless it is sampled
        ([sent(token(2), RANDOM)], 2, None, [WRONG, SIGNED]),
        ([sent(token(2), b"")], 2, None, [SIGNED]),
        ([sent(token(2), b"short")], 2, None, [WRONG, SIGNED]),
        ([sent(FORGED, RANDOM)], None, NOT_THE_POOLS, [WRONG]),
        ([sent(FORGED, b"")], None, NOT_THE_POOLS, []),
        ([sent(token(1)), sent(FORGED, RANDOM)], 1, NOT_THE_POOLS, [WRONG, BY_MAC]),
        ([sent(FORGED, KEY.mac(token(9)))], None, NOT_THE_POOLS, [WRONG]),
        # Every other check stays
        ([sent(token(11))], None, ABOVE, []),
        ([sent(token(1, enc=b64u(b"1" * 32)))], None, OTHER_REQUEST, []),
        ([sent(cut(token(2)))], None, NOT_THE_POOLS, [UNSIGNED]),
        ([sent(spelled(token(2)))], None, NOT_THE_POOLS, [UNSIGNED]),
        ([sent(JUNK)], None, NOT_THE_POOLS, []),
        ([sent(token(2)[: token(2).index(b".")] + f".{UNREADABLE}.{b64u(bytes(64))}".encode())], None, NOT_THE_POOLS, []),
        ([sent(b"\xff" * 4000)], None, NOT_THE_POOLS, []),
    ],
)
def test_which_receipt_counts(
    frames: Sequence[Frame], settled: int | None, refused: ReceiptFault | None, checks: list[str]
) -> None:
    verdict = judge(claim(*frames), sampled=False)
    assert (verdict.receipt.completion_tokens if verdict.receipt else None, verdict.refused) == (settled, refused)
    assert list(verdict.checks) == checks


def test_without_a_key_the_signature_decides() -> None:
    assert judge(claim(sent(token(2)), key=None), sampled=False).checks == (SIGNED,)
    assert judge(claim(sent(FORGED), key=None), sampled=False).refused is NOT_THE_POOLS
    other = SettlementKey(bytearray(os.urandom(32)))  # of another gateway, pool or time
    assert judge(claim(sent(token(2)), key=other), sampled=False).checks == (WRONG, SIGNED)
    assert judge(claim(sent(FORGED), key=other), sampled=False).refused is NOT_THE_POOLS


def test_a_sampled_claim_counts_by_its_signatures() -> None:
    """All of them: no older receipt with the right MAC stands in for the one that nobody else could verify."""
    verdict = judge(claim(sent(token(1, OTHERS)), sent(FORGED)), sampled=True)
    assert (verdict.receipt, verdict.refused, verdict.checks) == (None, NOT_THE_POOLS, (UNSIGNED, UNSIGNED))
    verdict = judge(claim(sent(token(1)), sent(FORGED)), sampled=True)
    assert verdict.receipt is not None
    assert (verdict.receipt.completion_tokens, verdict.checks) == (1, (UNSIGNED, BY_MAC))


def verdicts(log: io.StringIO, draws: list[int], claims: Sequence[Claim]) -> list[Verdict]:
    """Of claims that come one after the other."""
    found: list[Verdict] = []
    settlement = Settlement(make_log(log), draw=lambda: draws.pop(0) if draws else 10**6)
    settlement.close()  # from now on it judges at once
    for each in claims:
        settlement.settle(each, found.append)
    return found


def test_which_claims_are_sampled() -> None:
    log = io.StringIO()
    told = verdicts(log, [2, 1, 3], [claim(sent(FORGED)) for _ in range(8)])
    assert [number for number, verdict in enumerate(told, 1) if verdict.refused] == [2, 3, 6]
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["receipt refused", "receipt unsigned"] * 3


def test_wrong_macs_are_told_once_for_each_key() -> None:
    log = io.StringIO()
    keys = [SettlementKey(bytearray(os.urandom(32))) for _ in range(2)]
    told = verdicts(log, [], [claim(sent(token(2)), key=key) for key in keys * 3])
    assert [verdict.checks for verdict in told] == [(WRONG, SIGNED)] * 6
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["event"], line["pool"]) for line in lines] == [("receipt mac wrong", "default")] * 2


def test_one_claim_in_so_many_is_drawn() -> None:
    drawn = [_drawn() for _ in range(4000)]
    assert (min(drawn), max(drawn)) == (1, 2 * SAMPLED - 1)
    assert abs(sum(drawn) / len(drawn) - SAMPLED) < SAMPLED / 10
