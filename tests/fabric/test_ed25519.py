"""OpenSSL behind `lacre.jose.ed25519` and libsodium behind `lacre_fabric.native.ed25519` give one answer, the strictest.

The odd cases are made here by arithmetic on the curve (RFC 8032): points of small order and in second spellings, points with a
part of small order, and second halves that are too large.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature as BadSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as some

from lacre.errors import InvalidMessage, InvalidSignature
from lacre.evidence import checkpoints
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose import ed25519, jws
from lacre_fabric.native import ed25519 as native
from lacre_gateway.audit import open_requests

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(p: Point, q: Point) -> Point:
    (x1, y1), (x2, y2) = p, q
    product = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + product, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P


def times(number: int, point: Point) -> Point:
    found: Point = (0, 1)
    while number:
        if number & 1:
            found = add(found, point)
        point, number = add(point, point), number >> 1
    return found


def on(y: int, odd: int = 0) -> Point:
    """The point with this y. Its x is odd or even."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert (x * x - square) % P == 0
    return (x if x % 2 == odd else (P - x) % P), y


def spelled(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


BASE = on(4 * pow(5, -1, P) % P)
# What is left of any point of the whole group after its part of large order is gone; of this one, a point of order 8.
EIGHTH = times(ORDER, on(3))
SMALL = [times(number, EIGHTH) for number in range(8)]
assert len(set(SMALL)) == 8 and times(8, EIGHTH) == SMALL[0]
# The same y plus P, and the same point with a sign that it has not.
SECOND_SPELLINGS = [
    (number | sign << 255).to_bytes(32, "little") for number in (P, P + 1) for sign in (0, 1)
] + [(number | 1 << 255).to_bytes(32, "little") for number in (1, P - 1)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    kind: str
    public: bytes
    signature: bytes
    message: bytes
    holds: bool


def made(secret: int, nonce: int, a_part: Point, r_part: Point, message: bytes, kind: str) -> Case:
    """A signature by a key and a nonce that each have a part of small order."""
    public, first = spelled(add(times(secret, BASE), a_part)), spelled(add(times(nonce, BASE), r_part))
    challenge = int.from_bytes(hashlib.sha512(first + public + message).digest(), "little") % ORDER
    second = (nonce + challenge * secret) % ORDER
    exact = add(r_part, times(challenge, a_part)) == SMALL[0]  # otherwise only the equation times eight holds
    weak = secret == 0 or nonce == 0
    return Case(kind, public, first + second.to_bytes(32, "little"), message, exact and not weak)


def cases() -> Iterator[Case]:
    for number in range(24):
        message, secret, nonce = b"message %d" % number, 10**30 + number, 10**40 + number
        yield made(secret, nonce, SMALL[0], SMALL[0], message, "honest")
        yield made(secret, nonce, SMALL[number % 8], SMALL[0], message, "a key with a small part")
        yield made(secret, nonce, SMALL[0], SMALL[1 + number % 7], message, "a first half with a small part")
        yield made(secret, nonce, SMALL[1 + number % 7], SMALL[number % 8], message, "both with small parts")
        yield made(0, nonce, SMALL[number % 8], SMALL[0], message, "a key of small order")
        yield made(secret, 0, SMALL[0], SMALL[number % 8], message, "a first half of small order")
        yield made(0, 0, SMALL[number % 8], SMALL[number // 2 % 8], message, "both of small order")
        whole = made(secret, nonce, SMALL[0], SMALL[0], message, "honest")
        second = int.from_bytes(whole.signature[32:], "little")
        for more in (ORDER, 2 * ORDER, 8 * ORDER):
            if second + more < 2**256:
                longer = whole.signature[:32] + (second + more).to_bytes(32, "little")
                yield Case("a second half that is too large", whole.public, longer, message, False)
        for spelling in SECOND_SPELLINGS:
            yield Case("a key in a second spelling", spelling, whole.signature, message, False)
            yield Case("a first half in a second spelling", whole.public, spelling + whole.signature[32:], message, False)


CASES = list(cases())


def by_openssl_alone(case: Case) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(case.public).verify(case.signature, case.message)
    except (BadSignature, ValueError):
        return False
    return True


def test_one_answer_to_every_odd_case() -> None:
    wrong = [
        (case.kind, by.__module__, case.public.hex(), case.signature.hex())
        for case in CASES
        for by in (ed25519.verifies, native.verifies)
        if by(case.public, case.signature, case.message) is not case.holds
    ]
    assert wrong == []


def test_the_cases_can_tell_the_libraries_apart() -> None:
    """OpenSSL alone accepts keys and first halves of small order, or the checks before it would guard nothing."""
    alone = Counter(case.kind for case in CASES if by_openssl_alone(case) and not case.holds)
    assert alone.keys() >= {"a key of small order", "a first half of small order", "both of small order"}
    assert {case.kind for case in CASES if case.holds} >= {"honest", "a key with a small part", "both with small parts"}


@given(some.binary(min_size=32, max_size=32), some.binary(max_size=200))
def test_one_signature_whichever_library_makes_it(seed: bytes, data: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    signer = native.Signer(key)
    assert signer.public == jws.raw_public_key(key)
    assert signer.sign(data) == key.sign(data)
    assert all(by(signer.public, key.sign(data), data) for by in (ed25519.verifies, native.verifies))


@given(some.binary(max_size=70), some.binary(max_size=70), some.binary(max_size=8))
def test_any_bytes(public: bytes, signature: bytes, data: bytes) -> None:
    assert ed25519.verifies(public, signature, data) is native.verifies(public, signature, data)


@given(some.integers(0, 32 * 8 - 1), some.integers(0, 64 * 8 - 1))
def test_any_bit(in_key: int, in_signature: int) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public, signature = jws.raw_public_key(key), key.sign(b"data")
    for one, other in ((flipped(public, in_key), signature), (public, flipped(signature, in_signature))):
        assert not ed25519.verifies(one, other, b"data")
        assert not native.verifies(one, other, b"data")


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")


def test_no_repr_shows_a_secret() -> None:
    key = Ed25519PrivateKey.generate()
    assert key.private_bytes_raw().hex() not in repr(native.Signer(key))
    assert repr(key.private_bytes_raw()) not in repr(native.Signer(key))


# A key of small order: for one message in eight, OpenSSL takes this for a signature by it.
WEAK = spelled(SMALL[1])
UNSIGNED = spelled(SMALL[0]) + bytes(32)


@pytest.mark.parametrize("header", [{"alg": "EdDSA", "typ": "t"}, {"typ": "t", "alg": "EdDSA"}])
@pytest.mark.parametrize("check", [ed25519.verifies, native.verifies])
def test_no_statement_is_believed_under_a_weak_key(header: dict[str, Any], check: ed25519.Check) -> None:
    held = 0
    for number in range(40):
        signed = f"{jws.b64u(jws.written(header))}.{jws.b64u(jws.written({'n': number}))}"
        case = Case("", WEAK, UNSIGNED, signed.encode(), False)
        held += by_openssl_alone(case)
        with pytest.raises(InvalidSignature):
            jws.verify(f"{signed}.{jws.b64u(UNSIGNED)}", WEAK, "t", check=check)
    assert held


def test_no_checkpoint_is_believed_under_a_weak_key() -> None:
    class Nobody:
        def sign(self, _data: bytes, /) -> bytes:
            return UNSIGNED

    held = 0
    for size in range(40):
        checkpoint = Checkpoint("log", size, bytes(32))
        held += by_openssl_alone(Case("", WEAK, UNSIGNED, checkpoint.text(), False))
        with pytest.raises(InvalidSignature):
            checkpoints.verify(checkpoint.sign(Nobody(), checkpoints.key_id("log", WEAK)), WEAK)
    assert held


def test_no_list_of_open_requests_is_believed_under_a_weak_key() -> None:
    class Nobody:
        def sign(self, _data: bytes, /) -> bytes:
            return UNSIGNED

    held = 0
    for size in range(40):
        held += by_openssl_alone(Case("", WEAK, UNSIGNED, open_requests._signed("log", size, []), False))
        listed = open_requests.listed(Nobody(), "log", size, [])  # type: ignore[arg-type]
        assert open_requests.read(listed, WEAK, "log") is None
    assert held


def test_a_key_of_another_length_is_named() -> None:
    with pytest.raises(InvalidMessage, match="32 bytes"):
        jws.verify("a.b.", b"short", "t")
