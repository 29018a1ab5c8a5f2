"""Targets of what is signed, and of the connection string that pins who may sign.

The first byte of an input says how deep it goes: as it is, or as a payload that the right key signs, for no fuzzer guesses
a signature.
"""

from __future__ import annotations

import json
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fuzz.target import Target
from lacre.errors import Expired, InvalidMessage, InvalidSignature, MessageTooLarge, SettingsError, UntrustedRoot
from lacre.evidence.receipts import TYP as RECEIPT_TYP
from lacre.evidence.receipts import Receipt
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, raw_public_key, sign_bytes, verify
from lacre.trust.chain import ConnectionString, Trusted
from lacre.trust.chain import verify as verify_document
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP, Document, Manifest, ModelEntry, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_fabric.work.frames import ATTEMPT, KIND, SEQUENCE, Frame
from lacre_fabric.work.grants import TYP as GRANT_TYP
from lacre_fabric.work.grants import Grant

OF_A_SIGNATURE: Final = (InvalidMessage, InvalidSignature, MessageTooLarge)
OF_TRUST: Final = (*OF_A_SIGNATURE, UntrustedRoot, Expired)

NOW: Final = 1_800_000_000.0
ROOT, NEXT_ROOT, SIGNER, POOL_SIGNER = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in range(1, 5))
PINNED: Final = raw_public_key(ROOT)
POOL_KEY: Final = PrivateKey.derive(1, Kem.X25519, bytes(range(32)))
STATEMENT: Final = RootStatement(raw_public_key(SIGNER), NOW + 1e6)
NAMED: Final = ModelEntry(("0" * 64,), ("1" * 64,))
MANIFEST: Final = Manifest(
    "test", 7, NOW, NOW + 1e5, raw_public_key(SIGNER),
    {"default": Pool({"tiny": NAMED}, (PoolKey(POOL_KEY.config, NOW + 1e5),), raw_public_key(POOL_SIGNER), ("none", "pad"))},
)  # fmt: skip

# What an input to `manifest` is, by its first byte; for the others it is 0 for a whole token.
DOCUMENT, PAYLOAD, STATEMENT_PAYLOAD, CHANGE_OF_ROOT = range(4)


def text(data: bytes) -> str:
    """Also text that no encoding has: JSON's escapes can make lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def manifest(data: bytes) -> Trusted:
    kind, payload = data[0] % 4 if data else DOCUMENT, data[1:]
    roots, token = (sign_statement(STATEMENT, ROOT),), sign_manifest(MANIFEST, SIGNER)
    if kind == PAYLOAD:
        token = sign_bytes(payload, SIGNER, MANIFEST_TYP)
    elif kind != DOCUMENT:
        signers = (ROOT,) if kind == STATEMENT_PAYLOAD else (ROOT, NEXT_ROOT)
        roots = (tuple(sign_bytes(payload, key, ROOT_TYP) for key in signers),)
    document = payload if kind == DOCUMENT else Document(roots, token).encode()
    return verify_document(document, PINNED, NOW)


def manifest_was_signed(data: bytes, trusted: Trusted) -> None:
    """And what is trusted is written and read alike."""
    assert Manifest.parse(Members(trusted.manifest.members(), "the manifest")) == trusted.manifest
    if data[0] % 4 != PAYLOAD:
        assert trusted.manifest == MANIFEST


def jws(data: bytes) -> dict[str, Any]:
    """With the first byte 0 any token; otherwise a header line and a payload, signed as they are."""
    body = data[1:]
    if data[:1] == b"\x00":
        return verify(text(body), raw_public_key(SIGNER), "test+jwt")
    header, _, payload = body.partition(b"\n")
    signing_input = f"{b64u(header)}.{b64u(payload)}"
    token = f"{signing_input}.{b64u(SIGNER.sign(signing_input.encode()))}"
    return verify(token, raw_public_key(SIGNER), "test+jwt")


def is_object(_data: bytes, payload: dict[str, Any]) -> None:
    assert isinstance(payload, dict)


def grant(data: bytes) -> Grant:
    token = text(data[1:]) if data[:1] == b"\x00" else sign_bytes(data[1:], SIGNER, GRANT_TYP)
    return Grant.verify(token, [raw_public_key(SIGNER)], NOW)


def grant_written_alike(_data: bytes, found: Grant) -> None:
    assert Grant.verify(found.sign(SIGNER), [raw_public_key(SIGNER)], NOW) == found


def receipt(data: bytes) -> Receipt:
    token = text(data[1:]) if data[:1] == b"\x00" else sign_bytes(data[1:], SIGNER, RECEIPT_TYP)
    return Receipt.verify(token, raw_public_key(SIGNER))


def receipt_written_alike(_data: bytes, found: Receipt) -> None:
    assert Receipt.verify(found.sign(SIGNER), raw_public_key(SIGNER)) == found


def frame(data: bytes) -> tuple[dict[str, str], Frame]:
    """Header lines, an empty line and the payload, much as NATS has them."""
    head, _, payload = data.partition(b"\n\n")
    headers = dict(line.partition(":")[::2] for line in text(head).split("\n"))
    return headers, Frame.parse(headers, payload)


def frame_written_alike(_data: bytes, parsed: tuple[dict[str, str], Frame]) -> None:
    headers, found = parsed
    assert found.headers() == {name: headers[name] for name in (ATTEMPT, SEQUENCE, KIND)}
    assert Frame.parse(found.headers(), found.payload) == found


def connection_string(data: bytes) -> ConnectionString:
    return ConnectionString.parse(text(data))


def string_written_alike(_data: bytes, found: ConnectionString) -> None:
    assert ConnectionString.parse(str(found)) == found


def example_payloads() -> dict[str, bytes]:
    """A valid payload of each kind, for the seeds."""
    enc = b64u(bytes(32))
    example_grant = Grant(
        "r1", NOW, NOW + 60, "default", "tiny", "chat", "pad", 256, 4096, ("tools",), ("A" * 22, "B" * 22), enc
    )
    example_receipt = Receipt(enc, "sha256:00", 12, 4, 34, NOW, NOW + 1, True)
    change = RootStatement(raw_public_key(SIGNER), NOW + 1e6, raw_public_key(NEXT_ROOT))
    return {
        "manifest": json.dumps(MANIFEST.members(), separators=(",", ":")).encode(),
        "statement": STATEMENT.payload(),
        "change": change.payload(),
        "grant": json.dumps(example_grant.members(), separators=(",", ":")).encode(),
        "receipt": json.dumps(example_receipt.members(), separators=(",", ":")).encode(),
    }


TARGETS: Final = (
    Target("manifest", manifest, OF_TRUST, manifest_was_signed, json=True),
    Target("jws", jws, OF_A_SIGNATURE, is_object, json=True),
    Target("grant", grant, (*OF_A_SIGNATURE, Expired), grant_written_alike, json=True),
    Target("receipt", receipt, OF_A_SIGNATURE, receipt_written_alike, json=True),
    Target("frame", frame, (InvalidMessage,), frame_written_alike),
    Target("connection_string", connection_string, (SettingsError,), string_written_alike, max_length=512),
)
