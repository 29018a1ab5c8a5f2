"""Addresses of keys, what their services need, and key files that are wrapped or are not."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lacre.errors import LacreError, SettingsError
from lacre.jose.jws import raw_public_key
from lacre.wire.header import Kem
from lacre_fabric.keys import kms, pool_keys
from lacre_fabric.keys.kms import KeyWithheld, KmsError, KmsUnreachable, WrongWrapping
from lacre_fabric.keys.kms.service import LARGEST, HttpService
from lacre_fabric.keys.kms.wrapping import Keeping, keeping
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.operate import rotation
from lacre_fabric.operate.site import Site
from lacre_fabric.settings import KmsAddress, Table, parse
from parts.key_services.http import GZIP, Answer, Asked, Loopback

GOOD = [
    "plain:",
    "file:/etc/lacre/kms.key",
    "awskms:///arn:aws:kms:eu-central-1:111122223333:key/1234abcd",
    "awskms:///alias/lacre?region=eu-central-1",
    "gcpkms://projects/p/locations/l/keyRings/r/cryptoKeys/k",
    "azurekms://lacre.vault.azure.net/pools",
    "vault://vault.example:8200/transit/lacre?token-file=/run/vault/token",
    "pkcs11:token=lacre;object=pools?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=/run/pin",
]
SECRET = "hunter2hunter2"
SECRETS = [
    *(f"vault://{rest}" for rest in (f"root:{SECRET}@v/transit/k", f"v/transit/k?token={SECRET}", f"v:{SECRET}/transit/k")),
    f"pkcs11:token=lacre;object=pools?module-path=/x&pin-value={SECRET}",
    *(f"file:/kms.key?password={SECRET}", SECRET, f"s3://{SECRET}/key"),
]
IN_VAULT = ("v/transit", "/transit/k", "v/transit/k?token-file=token", "v/transit/k?tokenfile=/token")
INCOMPLETE = [
    *("file:kms.key", "file://etc/kms.key", "awskms:///", "awskms:///alias/lacre?regoin=eu-central-1"),
    "gcpkms://projects/p/keyRings/r/cryptoKeys/k",
    "gcpkms://projects/p/locations/l/keyRings/r/cryptoKeys/k?endpoint=http://kms.example",
    *("azurekms://lacre.vault.azure.net", "azurekms://lacre.vault.azure.net/pools/1/2"),
    *(f"vault://{rest}" for rest in IN_VAULT),
    "pkcs11:token=lacre?module-path=/x&pin-source=/y",
    "pkcs11:token=lacre;object=pools?module-path=/x",
    "pkcs11:token=lacre;object=pools;id=1?module-path=/x&pin-source=/y",
]
NEEDED = {"awskms": "boto3", "gcpkms": "google.auth", "azurekms": "azure.identity", "pkcs11": "pkcs11"}
EXTRAS = {
    "kms-aws": ("boto3", GOOD[3]),
    "kms-gcp": ("google.auth.transport.requests", GOOD[4]),
    "kms-azure": ("azure.identity", GOOD[5]),
    "kms-pkcs11": ("pkcs11", GOOD[7]),
}
POOL = "default"


class Settings(Table):
    key: KmsAddress = kms.PLAIN


@pytest.mark.parametrize("address", GOOD)
def test_an_address_is_checked_where_the_settings_are_read(address: str) -> None:
    assert parse(Settings, f'key = "{address}"', Path("worker.toml")).key == address


@pytest.mark.parametrize("address", SECRETS)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    for ask in (kms.check, kms.connect):
        with pytest.raises(SettingsError) as caught:
            ask(address)
        assert SECRET not in str(caught.value)
    with pytest.raises(SettingsError, match="key: ") as caught:
        parse(Settings, f'key = "{address}"', Path("worker.toml"))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", INCOMPLETE)
def test_an_incomplete_address_is_refused(address: str) -> None:
    if needed := NEEDED.get(address.partition(":")[0]):
        pytest.importorskip(needed, reason="`make tested` installs it")
    with pytest.raises(SettingsError):
        kms.connect(address)


def ran(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("extra", EXTRAS)
def test_without_its_library_the_error_names_the_extra(extra: str) -> None:
    module, address = EXTRAS[extra]
    code = f"""
import sys
sys.modules[{module!r}] = None  # as Python has it where it is not installed
from lacre_fabric.keys import kms
kms.check({address!r})
try:
    kms.connect({address!r})
except kms.ExtraMissing as exc:
    print(exc)
"""
    assert f"pip install 'lacre[{extra}]'" in ran(code)


def test_no_library_is_imported_before_it_is_asked_for() -> None:
    ran(
        "import sys, lacre_fabric.keys.kms, lacre_backend.keyring\n"
        "lacre_fabric.keys.kms.connect('file:/nowhere').close()\n"
        "assert not {'boto3', 'botocore', 'google.auth', 'azure.identity', 'pkcs11'} & set(sys.modules)"
    )


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"file:{tmp_path / 'kms.key'}"


@pytest.fixture
def site(tmp_path: Path, address: str) -> Site:
    site = Site(tmp_path / "state", {POOL: ("m",)})
    site.choose_kms(address)
    site.create()
    return site


@pytest.fixture
def folder(site: Site) -> Path:
    return site.keys_folder(POOL)


@pytest.fixture
def kept(site: Site, address: str) -> Iterator[Keeping]:
    with keeping(address, POOL) as kept:
        yield kept


def test_a_site_s_keys_are_wrapped_those_of_a_new_generation_too(site: Site, folder: Path, kept: Keeping) -> None:
    assert set(pool_keys.public_parts(folder, kept)) == set(site.generations(POOL).live[0].configs)
    receipt_key = pool_keys.read_receipt_key(site.receipt_file(POOL), kept)
    assert raw_public_key(receipt_key) == pool_keys.public_receipt_key(site.receipt_file(POOL))
    for path in (*pool_keys.files(folder), site.receipt_file(POOL)):
        with pytest.raises(SettingsError, match="set `kms`"):
            Keeping(None, POOL).read(path, Keeping(None, POOL).receipt_key())
    staged = rotation._staged(site, POOL)
    there = {pool_keys.read(path, kept).config for path in pool_keys.files(folder)}
    assert set(staged.configs) < there
    assert len(there) == 4


def test_who_signs_manifests_needs_not_unwrap(site: Site, tmp_path: Path) -> None:
    (tmp_path / "kms.key").unlink()
    assert site.sign_manifest()


def test_a_file_opens_under_its_own_name_and_pool_alone(folder: Path, kept: Keeping, address: str) -> None:
    (folder / "1.key").rename(folder / "3.key")
    with pytest.raises(WrongWrapping, match=r"3\.key"):
        pool_keys.read(folder / "3.key", kept)
    with keeping(address, "other") as others, pytest.raises(WrongWrapping, match=r"2\.key"):
        pool_keys.read(folder / "2.key", others)


def test_where_a_service_is_set_a_bare_key_is_refused(folder: Path, kept: Keeping) -> None:
    """Whoever can write the folder cannot make a worker hold a key of his own."""
    pool_keys.make(folder, (9,), (Kem.XWING,))
    with pytest.raises(SettingsError, match="rewrap"):
        pool_keys.read(folder / "9.key", kept)


def test_keys_that_are_there_are_not_left_behind_by_another_address(site: Site) -> None:
    site.choose_kms(site.kms)
    with pytest.raises(SettingsError, match="rewrap"):
        site.choose_kms("plain:")


def test_a_key_file_that_is_gone_is_told(folder: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "kms.key").rename(tmp_path / "away")
    with keeping(address, POOL) as kept, pytest.raises(KeyWithheld, match="is gone"):
        pool_keys.public_parts(folder, kept)
    write_secret(tmp_path / "kms.key", b"short")
    with keeping(address, POOL) as kept, pytest.raises(LacreError, match="32 bytes"):
        pool_keys.public_parts(folder, kept)


# A service over HTTP


@contextmanager
def vault(token: Path, answer: Callable[[Asked], Answer]) -> Iterator[Keeping]:
    with served(answer) as port, keeping(f"vault://127.0.0.1:{port}/transit/k?token-file={token}", POOL) as kept:
        yield kept


@contextmanager
def served(answer: Callable[[Asked], Answer]) -> Iterator[int]:
    server = Loopback(answer)
    try:
        yield server.port
    finally:
        server.close()


@pytest.mark.parametrize(
    "said",
    [
        *((200, said) for said in ({}, {"data": []}, b"[" * 60_000, GZIP + b"no gzip")),
        *((200, {"data": {"plaintext": text}}) for text in ("no base64!", None, "c2hvcnQ=")),
        (200, gzip.compress(b'{"data":{"plaintext":"' + b"A" * 1000 + b'"}}', mtime=0)),
        *((302, {}), (400, {"errors": None}), (400, {"errors": 5}), (418, {"errors": ["?"]}), (400, b"\xff")),
    ],
    ids=lambda said: repr(said)[:40],
)
def test_something_else_at_the_address(tmp_path: Path, said: Answer) -> None:
    write_secret(tmp_path / "token", b"t")
    wrapped = (200, {"data": {"ciphertext": "vault:v1:x"}})
    with vault(tmp_path / "token", lambda asked: wrapped if "encrypt" in asked.path else said) as kept:
        pool_keys.make(tmp_path / "keys", (1,), (Kem.X25519,), kept)
        with pytest.raises(KmsError, match=r"1\.key") as caught:
            pool_keys.read(tmp_path / "keys" / "1.key", kept)
    assert not caught.value.retryable


@pytest.mark.parametrize(("size", "taken"), [(LARGEST, True), (LARGEST + 1, False)])
def test_an_answer_has_a_largest_size(size: int, taken: bool) -> None:
    with served(lambda _: (200, b'{"a":"b"}'.ljust(size))) as port:
        with closing(HttpService("the vault", f"http://127.0.0.1:{port}")) as service:
            if taken:
                assert service.post("/", {}, {}).members == {"a": "b"}
            else:
                with pytest.raises(KmsError, match=f"more than {LARGEST} bytes"):
                    service.post("/", {}, {})


def test_a_token_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    (tmp_path / "token").chmod(0o644)
    asked: list[Asked] = []
    with vault(tmp_path / "token", lambda one: asked.append(one) or (500, {})) as kept:  # type: ignore[func-returns-value]
        with pytest.raises(SettingsError, match="chmod 600"):
            pool_keys.make(tmp_path / "keys", (1,), (Kem.X25519,), kept)
    assert asked == []


AWS_SAYS = {
    **dict.fromkeys(("AccessDeniedException", "NotFoundException", "DisabledException"), KeyWithheld),
    "KMSInvalidStateException": KeyWithheld,  # waits for its deletion
    **dict.fromkeys(("InvalidCiphertextException", "IncorrectKeyException"), WrongWrapping),
    **dict.fromkeys(("ThrottlingException", "DependencyTimeoutException", "KMSInternalException"), KmsUnreachable),
}


@pytest.mark.parametrize("code", AWS_SAYS)
def test_aws_s_documented_errors(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server of ours, for moto lets disabled keys decrypt: it shows what is made of AWS's word, and no revocation."""
    pytest.importorskip("boto3", reason="`make tested` installs it")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with served(lambda _asked: (500 if "Internal" in code else 400, {"__type": code, "message": "canary"})) as port:
        service = kms.connect(f"awskms://127.0.0.1:{port}/alias/lacre?region=eu-central-1")
        assert service is not None
        with closing(service), pytest.raises(AWS_SAYS[code]) as caught:
            service.unwrap(b"wrapped", kms.EncryptionContext("pool-key", POOL, 1))
    assert "canary" not in str(caught.value)
