"""Signatures of model files: OpenSSF Model Signing bundles (a Sigstore bundle with a key, DSSE, in-toto), as PyPI's
`model-signing` 1.1 writes and reads them.

Rules:
- A bundle signs the digest of each file of a model. It is read before it is trusted, so every member has a type and a size.
- Keys are on P-256, P-384 or P-521, the curves that Sigstore's bundles name. A signer's id is the bundle's `hint`: the SHA-256,
  in hex, of the public key as PEM.
- A file's own name is not compared: a signature of `model.gguf` is of its content, wherever it is copied. Shards are named.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from cryptography.exceptions import InvalidSignature as BadSignature
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from lacre.errors import InvalidMessage, InvalidSignature, SettingsError
from lacre.runtime import private_files
from lacre.runtime.json_objects import parse_object
from lacre_backend.engine.shards import files_of
from lacre_backend.models.gguf import WHOLE, FileDigests

SUFFIX: Final = ".sig"
MAX_BUNDLE: Final = 2**20  # bytes; one of 1,024 shards takes 200,000
_HINT: Final = 64  # hexadecimal digits of a signer's id
_MAX_KEY: Final = 2**16  # bytes of a PEM file

_BUNDLE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD: Final = "application/vnd.in-toto+json"
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PREDICATE: Final = "https://model_signing/signature/v1.0"
_HASHES: Final[Mapping[str, Callable[[], hashes.HashAlgorithm]]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


class UntrustedModel(InvalidSignature):
    """A model whose signature is absent, by another key, or over other bytes."""

    remedy = "Copy the model and its .sig from the signer again, or sign it with a key that is trusted here."


@dataclass(frozen=True, slots=True)
class SignedModel:
    """signer: id of the key. digest: of the model, as `lacre_backend.models.gguf.ModelFile`."""

    signer: str
    digest: str


@contextmanager
def naming(model: Path) -> Iterator[None]:
    """What the block raises of a signature names its model."""
    try:
        yield
    except UntrustedModel as exc:
        raise UntrustedModel(f"{model}: {exc}") from None
    except InvalidMessage as exc:
        raise InvalidMessage(f"{model}: {exc}") from None


def signature_path(path: Path) -> Path:
    """Where a model's bundle is: beside its first file, or its folder, with `.sig` after its name.

    Raises SettingsError, or OSError.
    """
    first = path.absolute() if path.is_dir() else files_of(path)[0]
    return first.with_name(first.name + SUFFIX)


def sign(digests: FileDigests, name: str, key: ec.EllipticCurvePrivateKey, ignored: Sequence[str] = ()) -> bytes:
    """A bundle. name: of the model, for people. ignored: paths in a folder that are no part of the model."""
    names = sorted(digests.each, key=PurePosixPath)
    resources = [{"name": file, "algorithm": "sha256", "digest": digests.each[file]} for file in names]
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(ignored)}
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(resources)}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    payload = json.dumps(statement).encode()
    public = key.public_key()
    signature = key.sign(_encoded(payload), ec.ECDSA(_HASHES[public.curve.name]()))
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": signer_id(public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode()


def verify(digests: FileDigests, bundle: bytes, keys: Iterable[ec.EllipticCurvePublicKey]) -> SignedModel:
    """Raises UntrustedModel if none of the keys signed it, or if it signs other bytes; InvalidMessage if it is no bundle."""
    payload, signature = _envelope(bundle)
    signer = next((key for key in keys if _is_of(key, signature, payload)), None)
    if signer is None:
        raise UntrustedModel("the model's signature is by no key that is trusted here")
    _compare(digests, payload)
    return SignedModel(signer_id(signer), "sha256:" + digests.model)


def check_content(digests: FileDigests, bundle: bytes) -> None:
    """Does not verify the signer. Raises UntrustedModel if the bundle signs other bytes, or InvalidMessage."""
    _compare(digests, _envelope(bundle)[0])


def _compare(digests: FileDigests, payload: bytes) -> None:
    signed = _resources(payload)
    if signed != dict(digests.each):
        wrong = sorted({*signed.items()} ^ {*digests.each.items()})[0][0]
        what = "the model" if wrong == WHOLE else f"its file {wrong[:128]!r}"
        raise UntrustedModel(f"{what} differs from the signed one: it changed afterwards")


def ignored_paths(bundle: bytes) -> tuple[str, ...]:
    """Paths in a folder that its bundle leaves out. Nothing is verified. Raises InvalidMessage."""
    said = _serialization(_envelope(bundle)[0]).get("ignore_paths", [])
    if not isinstance(said, list) or not all(isinstance(path, str) for path in said):
        raise InvalidMessage("the signature has no 'ignore_paths' of the right type")
    return tuple(said)


def claimed_signer(bundle: bytes) -> str:
    """The signer that a bundle names. Nothing is verified. Raises InvalidMessage."""
    material = _member(parse_object(bundle, "the signature", once=True), "verificationMaterial", dict)
    return str(_member(_member(material, "publicKey", dict), "hint", str))[:_HINT]


def signer_id(key: ec.EllipticCurvePublicKey) -> str:
    """The `hint` of a bundle."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def private_key(path: Path, passphrase: Callable[[], bytes]) -> ec.EllipticCurvePrivateKey:
    """The key of a PEM file, to sign with. passphrase: asked only if the file has one.

    Raises SettingsError, also if others can read a key without a passphrase, or OSError.
    """
    return _private(path, passphrase, lambda: private_files.check(path, path.stat().st_mode))


def _private(path: Path, passphrase: Callable[[], bytes], bare: Callable[[], None]) -> ec.EllipticCurvePrivateKey:
    """bare: called if the key has no passphrase."""
    data = _read(path)
    try:
        try:
            key = load_pem_private_key(data, None)
            bare()
        except TypeError:  # it has a passphrase
            key = load_pem_private_key(data, passphrase())
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"{path} holds no private key that can be read: check the file and its passphrase.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise SettingsError(_other_kind(path))
    return key


def public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of a PEM file, which may also hold the private key. Raises SettingsError, or OSError."""
    data = _read(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        if b"PRIVATE KEY" not in data:
            raise SettingsError(f"{path} holds no public key in PEM: give the signer's public key.") from None
        return _private(path, _no_passphrase, lambda: None).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise SettingsError(_other_kind(path))
    return key


def _no_passphrase() -> bytes:
    raise SettingsError("This is a private key with a passphrase: give its public key.")


def _other_kind(path: Path) -> str:
    return (
        f"{path} holds a key of another kind: model signatures need one on P-256, P-384 or P-521. "
        "Make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
    )


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_KEY + 1)
    if len(data) > _MAX_KEY:
        raise SettingsError(f"{path} is no PEM file: it is too large. Give a key.")
    return data


def read_bundle(path: Path) -> bytes:
    """The bytes of a bundle. Raises InvalidMessage, or OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BUNDLE + 1)
    if len(data) > MAX_BUNDLE:
        raise InvalidMessage(f"{path} is no signature: it has more than {MAX_BUNDLE:,} bytes")
    return data


def _is_of(key: ec.EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, _encoded(payload), ec.ECDSA(_HASHES[key.curve.name]()))
    except BadSignature:
        return False
    return True


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding (protocol.md, version 1)."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _root(resources: Iterable[Mapping[str, str]]) -> str:
    """The digest over all digests, which names the model as the subject of the statement."""
    return hashlib.sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources)).hexdigest()


def _envelope(bundle: bytes) -> tuple[bytes, bytes]:
    """Payload and signature."""
    value = parse_object(bundle, "the signature", once=True)
    envelope = _member(value, "dsseEnvelope", dict)
    if value.get("mediaType") != _BUNDLE or _member(envelope, "payloadType", str) != _PAYLOAD:
        raise InvalidMessage(
            "the signature is no Sigstore bundle of version 0.3 with a statement of in-toto: sign the model again"
        )
    signatures = _member(envelope, "signatures", list)
    if len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise InvalidMessage("the signature's envelope must have one signature")
    return _decoded(_member(envelope, "payload", str)), _decoded(_member(signatures[0], "sig", str))


def _resources(payload: bytes) -> dict[str, str]:
    """The signed digests by file name."""
    predicate, serialization = _predicate(payload), _serialization(payload)
    if serialization.get("method") != "files" or serialization.get("hash_type") != "sha256":
        raise InvalidMessage("the signed digests are not SHA-256 over whole files: sign the model again without other options")
    found: dict[str, str] = {}
    resources = _member(predicate, "resources", list)
    for resource in resources:
        if not isinstance(resource, dict) or resource.get("algorithm") != "sha256":
            raise InvalidMessage("the signed statement has a digest that is not SHA-256")
        found[_member(resource, "name", str)] = _member(resource, "digest", str)
    if len(found) != len(resources):
        raise InvalidMessage("the signed statement names a file twice")
    return found


def _predicate(payload: bytes) -> Mapping[str, Any]:
    statement = parse_object(payload, "the signed statement", once=True)
    if statement.get("_type") != _STATEMENT or statement.get("predicateType") != _PREDICATE:
        raise InvalidMessage("the signed statement is of another kind: sign the model with `lacre model sign`")
    return cast(Mapping[str, Any], _member(statement, "predicate", dict))


def _serialization(payload: bytes) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], _member(_predicate(payload), "serialization", dict))


def _member(value: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    if not isinstance(found := value.get(name), kind):
        raise InvalidMessage(f"the signature has no {name!r} of the right type")
    return found


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise InvalidMessage("the signature has a member that is not base64") from None
