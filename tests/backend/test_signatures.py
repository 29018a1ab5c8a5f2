"""Signatures of model files: OpenSSF Model Signing bundles. `tests/heavy` compares them with PyPI's `model-signing`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner

from lacre.errors import InvalidMessage, SettingsError
from lacre_backend.commands.model import commands
from lacre_backend.models.gguf import FileDigests, find
from lacre_backend.models.signatures import (
    SignedModel,
    UntrustedModel,
    claimed_signer,
    private_key,
    public_key,
    sign,
    signer_id,
    verify,
)
from parts.tiny_model import tiny_model, tiny_split_model


def read(path: Path) -> FileDigests:
    return find(path).digests


KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
PLAIN = NoEncryption()


def pem(
    path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, lock: KeySerializationEncryption = PLAIN
) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_a_key_signed_it_verifies(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    digests, key = read(tiny_model(tmp_path / "m.gguf")), ec.generate_private_key(curve)
    bundle = sign(digests, "m.gguf", key)
    assert verify(digests, bundle, [OTHER.public_key(), key.public_key()]) == SignedModel(
        signer_id(key.public_key()), "sha256:" + digests.model
    )
    assert claimed_signer(bundle) == signer_id(key.public_key())
    with pytest.raises(UntrustedModel, match="no key that is trusted here"):
        verify(digests, bundle, [OTHER.public_key()])


def test_each_shard_is_signed_by_name(tmp_path: Path) -> None:
    files = tiny_split_model(tmp_path)
    digests = read(files[1])
    assert list(digests.each) == [file.name for file in files]
    bundle = sign(digests, "tiny", KEY)
    data = files[2].read_bytes()
    files[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UntrustedModel, match=f"its file '{files[2].name}' differs from the signed one"):
        verify(read(files[0]), bundle, [KEY.public_key()])


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf")
    whole, bundle = path.read_bytes(), sign(read(path), "m.gguf", KEY)
    for at in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UntrustedModel, match="it changed afterwards"):
            verify(read(path), bundle, [KEY.public_key()])


Bundle = dict[str, Any]


def resigned(bundle: Bundle, change: Callable[[Bundle], object]) -> Bundle:
    """With a statement that the right key signed, but that says something else."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    kind = b"application/vnd.in-toto+json"
    signature = KEY.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload), ec.ECDSA(SHA256()))
    envelope = bundle["dsseEnvelope"] | {
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    return bundle | {"dsseEnvelope": envelope}


CHANGES: dict[str, tuple[Callable[[Bundle], Bundle], type[Exception], str]] = {
    "another media type": (lambda b: b | {"mediaType": "x"}, InvalidMessage, "no Sigstore bundle"),
    "no envelope": (lambda b: {k: v for k, v in b.items() if k != "dsseEnvelope"}, InvalidMessage, "'dsseEnvelope'"),
    "not base64": (lambda b: b | {"dsseEnvelope": b["dsseEnvelope"] | {"payload": "%"}}, InvalidMessage, "not base64"),
    "two signatures": (
        lambda b: b | {"dsseEnvelope": b["dsseEnvelope"] | {"signatures": b["dsseEnvelope"]["signatures"] * 2}},
        InvalidMessage,
        "one signature",
    ),
    "another payload": (
        lambda b: b | {"dsseEnvelope": b["dsseEnvelope"] | {"payload": base64.b64encode(b"{}").decode()}},
        UntrustedModel,
        "no key that is trusted",
    ),
    "another predicate": (
        lambda b: resigned(b, lambda s: s.update(predicateType="https://other")),
        InvalidMessage,
        "another kind",
    ),
    "shards of files": (
        lambda b: resigned(b, lambda s: s["predicate"]["serialization"].update(method="shards")),
        InvalidMessage,
        "over whole files",
    ),
    "another algorithm": (
        lambda b: resigned(b, lambda s: s["predicate"]["resources"][0].update(algorithm="blake3")),
        InvalidMessage,
        "not SHA-256",
    ),
    "a file twice": (
        lambda b: resigned(b, lambda s: s["predicate"].update(resources=s["predicate"]["resources"] * 2)),
        InvalidMessage,
        "twice",
    ),
    "no files": (lambda b: resigned(b, lambda s: s["predicate"].update(resources=[])), UntrustedModel, "changed afterwards"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bent_bundles_are_refused(tmp_path: Path, name: str) -> None:
    change, error, said = CHANGES[name]
    digests = read(tiny_model(tmp_path / "m.gguf"))
    bundle = change(json.loads(sign(digests, "m.gguf", KEY)))
    with pytest.raises(error, match=said):
        verify(digests, json.dumps(bundle).encode(), [KEY.public_key()])


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a":1,"a":1}', b"\xff"])
def test_other_bytes_are_no_bundle(data: bytes) -> None:
    with pytest.raises(InvalidMessage):
        claimed_signer(data)


def test_keys_of_other_kinds_say_what_to_make(tmp_path: Path) -> None:
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(SettingsError, match="openssl ecparam"):
            private_key(pem(tmp_path / "k.pem", key), bytes)
    (tmp_path / "no.pem").write_bytes(b"no key")
    with pytest.raises(SettingsError, match="no public key"):
        public_key(tmp_path / "no.pem")
    with pytest.raises(SettingsError, match="no private key"):
        private_key(tmp_path / "no.pem", bytes)


def test_a_passphrase_is_asked_only_where_there_is_one(tmp_path: Path) -> None:
    locked = pem(tmp_path / "k.pem", KEY, BestAvailableEncryption(b"word"))
    assert private_key(locked, lambda: b"word").public_key() == KEY.public_key()
    with pytest.raises(SettingsError, match="its passphrase"):
        private_key(locked, lambda: b"other")
    with pytest.raises(SettingsError, match="give its public key"):
        public_key(locked)


def test_the_commands(tmp_path: Path) -> None:
    model, key = tiny_model(tmp_path / "m.gguf"), pem(tmp_path / "k.pem", KEY)
    public = tmp_path / "p.pem"
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    unsigned = CliRunner().invoke(commands, ["verify", str(model), "--key", str(public)])
    assert isinstance(unsigned.exception, UntrustedModel)
    signed = CliRunner().invoke(commands, ["sign", str(model), "--key", str(key), "--json"])
    told = json.loads(signed.stdout)
    assert told == {
        "signature": f"{model}.sig",
        "signer": signer_id(KEY.public_key()),
        "digest": "sha256:" + read(model).model,
    }
    for given in (public, key):
        assert json.loads(CliRunner().invoke(commands, ["verify", str(model), "--key", str(given), "--json"]).stdout) == told
    inspected = json.loads(CliRunner().invoke(commands, ["inspect", str(model), "--json"]).stdout)
    assert told["signer"] in inspected["signature"]
