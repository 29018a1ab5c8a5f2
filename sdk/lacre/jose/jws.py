"""Compact JWS (RFC 7515) with EdDSA over Ed25519 (RFC 8037), the only signature form of Lacre's statements.

Every kind of statement has its own `typ`, and the verifier names the one it expects: a grant never passes for a manifest (RFC
8725 section 3.11).
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lacre.errors import InvalidMessage, InvalidSignature, MessageTooLarge
from lacre.jose.ed25519 import KEY_BYTES, Check, Signs, is_weak, verifies
from lacre.runtime.json_objects import parse_object

if TYPE_CHECKING:
    import jwt

ALGORITHM: Final = "EdDSA"
# Servers pass quicker ones than the standard library's, with the same results.
Read = Callable[[bytes, str], dict[str, Any]]
Write = Callable[[Mapping[str, Any]], bytes]
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")
MAX_TOKEN: Final = 512 * 1024  # characters; a manifest of some thousand pools with X-Wing keys stays below it


def b64u(data: bytes) -> str:
    """base64url without padding (RFC 7515 section 2)."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def b64u_decode(text: str) -> bytes:
    """The inverse of `b64u`; accepts only its canonical output. Raises InvalidMessage."""
    try:
        data = binascii.a2b_base64(text.encode("ascii").translate(_FROM_URL) + b"=" * (-len(text) % 4))
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise InvalidMessage("not base64url") from exc
    if b64u(data) != text:
        raise InvalidMessage("not canonical base64url")
    return data


def raw_public_key(key: Ed25519PrivateKey) -> bytes:
    """The 32-byte public key that belongs to `key`."""
    return key.public_key().public_bytes_raw()


def written(payload: Mapping[str, Any]) -> bytes:
    """The JSON form of `payload`."""
    return json.dumps(payload, separators=(",", ":")).encode()


def sign(payload: Mapping[str, Any], key: Signs, typ: str, write: Write = written) -> str:
    """Signs the JSON form of `payload`. write: makes that form."""
    return sign_bytes(write(payload), key, typ)


def sign_bytes(payload: bytes, key: Signs, typ: str) -> str:
    """Signs bytes unchanged: the two signers of a change of root must sign the same bytes."""
    signed = f"{_header(typ)}.{b64u(payload)}"
    return f"{signed}.{b64u(key.sign(signed.encode()))}"


@cache
def _header(typ: str) -> str:
    return b64u(json.dumps({"alg": ALGORITHM, "typ": typ}, separators=(",", ":")).encode())


@cache
def _jws() -> jwt.PyJWS:
    import jwt  # noqa: PLC0415 - keeps `import lacre` fast

    return jwt.PyJWS(algorithms=[ALGORITHM])


def verify(
    token: str, key: bytes | Ed25519PublicKey, typ: str, read: Read = parse_object, check: Check = verifies
) -> dict[str, Any]:
    """The JSON object signed in `token`. key: 32 raw bytes or the key object. read: parses it, as `parse_object` does. check:
    verifies the signature, as `ed25519.verifies` does.

    Raises InvalidMessage (malformed), InvalidSignature (another key, other bytes or another `typ`), MessageTooLarge.
    """
    if len(token) > MAX_TOKEN:
        raise MessageTooLarge(f"the signed statement has over {MAX_TOKEN} characters")
    # Some decoders ignore padding, which is not signed: two spellings of one statement would pass for two statements.
    signed, _, signature = token.rpartition(".")
    raw = b64u_decode(signature)
    public = key if isinstance(key, bytes) else key.public_bytes_raw()
    if len(public) != KEY_BYTES:
        raise InvalidMessage("an Ed25519 public key has 32 bytes")
    header, _, payload = signed.partition(".")
    if header == _header(typ):
        return read(_verified(signed, payload, raw, public, typ, check), f"the payload of a {typ}")
    return _verify_other(token, raw, public, typ)


def _verified(  # noqa: PLR0917 - the parts of one token
    signed: str, payload: str, signature: bytes, public: bytes, typ: str, check: Check
) -> bytes:
    """The payload under exactly our own header: nothing in it needs parsing, and it chooses nothing."""
    try:
        data = signed.encode("ascii")
    except UnicodeEncodeError as exc:
        raise InvalidMessage(f"the {typ} is not a compact JWS") from exc
    if not check(public, signature, data):
        raise InvalidSignature(f"the signature of a {typ} is not by the expected key")
    return b64u_decode(payload)


def _verify_other(token: str, signature: bytes, public: bytes, typ: str) -> dict[str, Any]:
    """For a header that says the same in another spelling, or something else."""
    import jwt  # noqa: PLC0415 - keeps `import lacre` fast

    if is_weak(public) or is_weak(signature[:KEY_BYTES]):
        raise InvalidSignature(f"the signature of a {typ} is not by the expected key")
    key = Ed25519PublicKey.from_public_bytes(public)
    try:
        decoded = _jws().decode_complete(token, key, algorithms=[ALGORITHM])
    except jwt.InvalidSignatureError as exc:
        raise InvalidSignature(f"the signature of a {typ} is not by the expected key") from exc
    except (jwt.InvalidAlgorithmError, jwt.InvalidKeyError) as exc:
        raise InvalidSignature(f"a {typ} must be signed with {ALGORITHM}") from exc
    except (jwt.InvalidTokenError, UnicodeError, RecursionError) as exc:
        raise InvalidMessage(f"the {typ} is not a compact JWS") from exc
    header, payload, _ = token.split(".")
    b64u_decode(payload)  # PyJWT reads other spellings too, and headers in other encodings
    if parse_object(b64u_decode(header), f"the header of a {typ}").get("typ") != typ:
        raise InvalidSignature(f"the signed statement has another type than the expected {typ}")
    return parse_object(decoded["payload"], f"the payload of a {typ}")


def read_object(segment: str) -> dict[str, Any]:
    """The JSON object in one part of a compact JWS. Raises InvalidMessage.

    One that names a member twice, at any depth, is refused.
    """
    return parse_object(b64u_decode(segment), "a part of a token", once=True)
