"""Kept receipts: who signed them, by the manifest of today, and which of them no longer count."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre.errors import InvalidMessage, InvalidReceipt, SettingsError, UsageError
from lacre.evidence.kept_receipts import check
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import Manifest, PastReceiptKey, Pool, PoolKey
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay
from parts.up import LACRE

NOW = 1_800_000_000.0
IN_USE, OF_ONE_KEY, PAST, STRANGE = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 5))
RECEIPT = Receipt("e" * 43, "sha256:77", 7, 2, 3, NOW - 10, NOW, final=True)

Run = Callable[..., subprocess.CompletedProcess[str]]


def key_of(number: int, receipts: Ed25519PrivateKey | None = None) -> PoolKey:
    own = None if receipts is None else raw_public_key(receipts)
    return PoolKey(PrivateKey.generate(number, Kem.X25519).config, NOW + 60, own)


def pool_of(signing: Ed25519PrivateKey, *keys: PoolKey, past: tuple[PastReceiptKey, ...] = ()) -> Pool:
    return Pool({}, keys, raw_public_key(signing), ("none",), past)


PAST_KEY = PastReceiptKey(raw_public_key(PAST), NOW)
MANIFEST = Manifest(
    "lacre",
    1,
    NOW,
    NOW + 60,
    bytes(32),
    {"other": pool_of(STRANGE, key_of(1)), "default": pool_of(IN_USE, key_of(1), key_of(2, OF_ONE_KEY), past=(PAST_KEY,))},
)


@pytest.mark.parametrize(("key", "until"), [(IN_USE, None), (OF_ONE_KEY, None), (PAST, NOW)])
def test_every_key_that_the_manifest_names_counts(key: Ed25519PrivateKey, until: float | None) -> None:
    kept = check(RECEIPT.sign(key), MANIFEST)
    assert (kept.receipt, kept.pool, kept.key, kept.until) == (RECEIPT, "default", raw_public_key(key), until)
    assert check(kept.receipt.text(), MANIFEST, "default") == kept


def test_a_replaced_key_signs_nothing_later() -> None:
    late = dataclasses.replace(RECEIPT, end=NOW + 0.001)
    with pytest.raises(InvalidReceipt, match="a thief of the key"):
        check(late.sign(PAST), MANIFEST)
    assert check(late.sign(IN_USE), MANIFEST).until is None


@pytest.mark.parametrize("pool", [None, "other"])
def test_other_keys_do_not_count(pool: str | None) -> None:
    stranger = Ed25519PrivateKey.generate() if pool is None else IN_USE
    with pytest.raises(InvalidReceipt, match="no key of"):
        check(RECEIPT.sign(stranger), MANIFEST, pool)


def test_a_pool_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match="unknown pool 'x': the manifest has other, default"):
        check(RECEIPT.sign(IN_USE), MANIFEST, "x")


def test_a_receipt_that_nobody_signed_has_no_text() -> None:
    with pytest.raises(UsageError):
        RECEIPT.text()


@pytest.mark.parametrize("cut", range(0, 400, 23))
def test_a_part_of_one(cut: int) -> None:
    text = RECEIPT.sign(IN_USE)
    with pytest.raises((InvalidMessage, InvalidReceipt)):
        check(text[: min(cut, len(text) - 1)], MANIFEST)


@pytest.mark.parametrize("text", ["é", "a.é.AA", "..", "{}", "\0", "\ud800", "x" * 60_000])
def test_what_is_no_receipt(text: str) -> None:
    head = RECEIPT.sign(IN_USE).split(".")[0]
    for each in (text, f"{head}.{text}.{'A' * 86}"):
        with pytest.raises(lacre.LacreError):
            check(each, MANIFEST)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    with ExitStack() as stack:
        stack.callback(engine.close)
        yield stack.enter_context(beside(Gateway(Relay(create_app([engine])))))


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LACRE, *arguments], check=False, capture_output=True, text=True, env=settings(gateway, tmp_path), timeout=90
        )

    return run


def test_the_command(run: Run, tmp_path: Path) -> None:
    """With the receipt that `lacre ask --json` prints."""
    kept = tmp_path / "kept"
    answer = json.loads(run("ask", "Hi.", "--json").stdout)
    kept.write_text(answer["receipt"] + "\n")
    shown = run("receipt", "check", str(kept))
    assert shown.returncode == 0, shown.stderr
    assert "the pool default signed this with its present key" in shown.stdout
    told = json.loads(run("receipt", "check", str(kept), "--json").stdout)
    assert (told["ok"], told["pool"], told["until"]) == (True, "default", None)
    assert told["receipt"] == answer["verification"]["receipt"]
    head, payload, signature = answer["receipt"].split(".")
    kept.write_text(f"{head}.{payload}.{signature[::-1]}")
    assert run("receipt", "check", str(kept)).returncode in (5, 6)  # the last character may now be impossible
    kept.write_text(RECEIPT.sign(Ed25519PrivateKey.generate()))
    refused = run("receipt", "check", str(kept), "--json")
    assert refused.returncode == 5
    assert json.loads(refused.stdout)["error"]["type"] == "InvalidReceipt"
    kept.write_text(json.dumps(answer))
    refused = run("receipt", "check", str(kept))
    assert refused.returncode == 1 and "holds no receipt" in refused.stderr
    kept.write_bytes(b"\xff" * 10)
    assert run("receipt", "check", str(kept)).returncode == 1
    assert run("receipt", "check", str(tmp_path / "none")).returncode == 1
