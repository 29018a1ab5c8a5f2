"""Keys for MACs of receipts: a gateway seals them, and only the workers that may use them open them."""

from __future__ import annotations

import gc
import hashlib
import hmac
import time
from collections.abc import Callable

import pytest

from lacre.errors import OpenError
from lacre.jose.jws import b64u, b64u_decode
from lacre.trust.manifest import Pool, PoolKey
from lacre.wire.header import Kem, SealedHeader
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey, open_request
from lacre_backend.node import opened_keys
from lacre_backend.node.opened_keys import OpenedKeys
from lacre_fabric.work.settlement_keys import KEY_BYTES, LIFETIME, MAX_SEALED, SettlementKey, SettlementKeys, seal

RECEIPT = b"a receipt"
KEM = pytest.mark.parametrize("kem", Kem, ids=lambda kem: kem.label)


def pool_of(*keys: PrivateKey) -> Pool:
    return Pool({}, tuple(PoolKey(key.config, time.time() + 60) for key in keys), bytes(32), ())


def held(*keys: PrivateKey) -> dict[int, PrivateKey]:
    return {key.config.key_id: key for key in keys}


def made(key: PrivateKey, gateway: str = "g1", pool: str = "a") -> SettlementKey:
    found = SettlementKeys(gateway).of(pool, pool_of(key), key.config.key_id)
    assert found is not None
    return found


@KEM
def test_both_sides_make_the_same_macs(kem: Kem) -> None:
    key = PrivateKey.generate(3, kem)
    mine = made(key)
    theirs = OpenedKeys("a").find(mine.sealed, "g1", 3, held(key))
    assert theirs is not None
    assert theirs.mac(RECEIPT) == mine.mac(RECEIPT) != mine.mac(RECEIPT + b"x")
    assert len(mine.mac(RECEIPT)) == 32
    assert len(mine.sealed) <= MAX_SEALED
    assert made(key).mac(RECEIPT) != mine.mac(RECEIPT), "another process has another key"


@KEM
def test_the_form(kem: Kem) -> None:
    """As `settlement_keys` says it."""
    key, secret = PrivateKey.generate(3, kem), bytearray(range(KEY_BYTES))
    sealed = b64u_decode(seal(key.config, secret, "a", "g1"))
    header = SealedHeader.parse(sealed)
    assert (header.key_id, header.suite) == (3, key.config.suite())
    assert len(sealed) == 7 + kem.n_enc + 32 + 16
    expected = hmac.new(secret, b"lacre receipt MAC 1\0" + RECEIPT, hashlib.sha256).digest()
    assert SettlementKey(bytearray(secret)).mac(RECEIPT) == expected


OTHERS: dict[str, Callable[[PrivateKey, str], tuple[str, str, str, PrivateKey]]] = {
    "another gateway": lambda key, sealed: (sealed, "g2", "a", key),
    "another pool": lambda key, sealed: (sealed, "g1", "b", key),
    "names that join alike": lambda key, sealed: (made(key, "1b", "ag").sealed, "g1b", "a", key),
    "another key": lambda key, sealed: (sealed, "g1", "a", PrivateKey.generate(3, key.config.kem)),
    "another kem": lambda key, sealed: (sealed, "g1", "a", PrivateKey.generate(3, _other(key.config.kem))),
    "nothing": lambda key, sealed: ("", "g1", "a", key),
    "no base64url": lambda key, sealed: ("=" + sealed[1:], "g1", "a", key),
    "a byte less": lambda key, sealed: (b64u(b64u_decode(sealed)[:-1]), "g1", "a", key),
    "a byte more": lambda key, sealed: (b64u(b64u_decode(sealed) + b"x"), "g1", "a", key),
    "only a header": lambda key, sealed: (b64u(b64u_decode(sealed)[:-48]), "g1", "a", key),
    "another byte": lambda key, sealed: (b64u(b64u_decode(sealed)[:-1] + bytes([b64u_decode(sealed)[-1] ^ 1])), "g1", "a", key),
    "an unknown suite": lambda key, sealed: (b64u(b"\x03\xff\xff" + b64u_decode(sealed)[3:]), "g1", "a", key),
    "a point of low order": lambda key, sealed: (b64u(b64u_decode(sealed)[:7] + bytes(key.config.kem.n_enc + 48)), "g1", "a",
                                                  key),
    "too long": lambda key, sealed: ("A" * (MAX_SEALED + 1), "g1", "a", key),
    "no text": lambda key, sealed: ("\ud800\N{SNOWMAN}", "g1", "a", key),
    "a sealed request": lambda key, sealed: (b64u(seal_request(key.config, bytes(15))[0]), "g1", "a", key),
}  # fmt: skip


def _other(kem: Kem) -> Kem:
    return next(each for each in Kem if each is not kem)


@KEM
@pytest.mark.parametrize("other", OTHERS)
def test_what_does_not_open_is_no_key_and_no_error(kem: Kem, other: str) -> None:
    key = PrivateKey.generate(3, kem)
    sealed, gateway, pool, holder = OTHERS[other](key, made(key).sealed)
    assert OpenedKeys(pool).find(sealed, gateway, 3, held(holder)) is None


@KEM
def test_a_sealed_key_never_opens_as_a_request(kem: Kem) -> None:
    key = PrivateKey.generate(3, kem)
    data = b64u_decode(made(key).sealed)
    cut = 7 + kem.n_enc
    with pytest.raises(OpenError):
        open_request(held(key), data[:cut] + b"\x00" + data[cut:])


def test_a_key_lasts_ten_minutes_and_is_of_one_pool_key() -> None:
    now, keys = [0.0], [PrivateKey.generate(1), PrivateKey.generate(2, Kem.X25519)]
    gateway, pool = SettlementKeys("g1", lambda: now[0]), pool_of(*keys)
    first, second = gateway.of("a", pool, 1), gateway.of("a", pool, 2)
    assert first is not None and second is not None and first.mac(RECEIPT) != second.mac(RECEIPT)
    now[0] = LIFETIME - 1
    assert gateway.of("a", pool, 1) is first
    assert gateway.of("a", pool_of(*keys), 1) is first, "a newer manifest with the same key"
    assert gateway.of("b", pool, 1) is not first
    assert gateway.of("a", pool, 9) is None
    replaced = gateway.of("a", pool_of(PrivateKey.generate(1)), 1)
    assert replaced is not None and replaced is not first, "another key of the same id"
    now[0] = LIFETIME
    later = gateway.of("a", pool, 2)
    assert later is not None and later is not second
    now[0] = 3 * LIFETIME
    gateway.of("a", pool, 2)
    assert len(gateway._held) == 1, "ended ones are forgotten"


def test_a_pool_key_that_cannot_be_sealed_to_costs_no_request() -> None:
    key = PrivateKey.generate(1, Kem.X25519)
    low_order = type(key.config)(1, Kem.X25519, bytes(32))
    pool = Pool({}, (PoolKey(low_order, time.time() + 60),), bytes(32), ())
    assert SettlementKeys("g1").of("a", pool, 1) is None


def test_few_are_remembered_and_none_of_a_key_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened_keys, "MOST", 4)
    key = PrivateKey.generate(1, Kem.X25519)
    worker, sealed = OpenedKeys("a"), [made(key).sealed for _ in range(9)]
    found = [worker.find(each, "g1", 1, held(key)) for each in sealed]
    assert len(worker._found) == 4
    assert worker.find(sealed[-1], "g1", 1, held(key)) is found[-1]
    assert worker.find(sealed[0], "g1", 1, held(key)) is not found[0], "it was forgotten, and opens again"
    assert worker.find(sealed[-1], "g1", 1, {}) is None, "its pool key is gone"
    other = PrivateKey.generate(1, Kem.X25519)
    assert worker.find(made(other).sealed, "g1", 1, held(other)) is not None
    assert len(worker._found) == 1


def test_a_key_is_overwritten_at_its_end_and_never_shown() -> None:
    secret = bytearray(b"canary" * 5 + b"12")
    key = SettlementKey(secret, "sealed")
    assert "canary" not in repr(key)
    del key
    gc.collect()
    assert secret == bytes(KEY_BYTES)
