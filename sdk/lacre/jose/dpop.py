"""Access tokens bound to a key of the application: makes and verifies DPoP proofs (RFC 9449).

Rules:
- A proof is for one method, one URL and one access token. With `lacre_req` (base64url SHA-256 of `hdr ‖ enc`) it is also for
  one sealed request. A replayed proof then replays that request, and no gateway accepts a sealed request twice.
- Only `ES256` and `EdDSA`: the verifier chooses the algorithm, not the sender of a proof.
- The key in a proof proves nothing by itself. Its thumbprint (RFC 7638) must be the one in the token.
- A verified proof is valid for `WINDOW` seconds around its time. The verifier must remember it, to accept it only once.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage, InvalidSignature, MessageTooLarge, SettingsError, VerificationError
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, read_object
from lacre.runtime import arguments, folders
from lacre.runtime.forks import StaysInProcess

if TYPE_CHECKING:
    import jwt

HEADER: Final = "dpop"
ALGORITHMS: Final = ("ES256", "EdDSA")
TYP: Final = "dpop+jwt"
# Seconds that a proof's `iat` may be off, each way; as much as a worker allows for a request's date. The fabric remembers a
# sealed request for 900 s, longer than any proof of it is valid.
WINDOW: Final = 300.0
MAX_FILE: Final = 64 * 1024  # bytes read of a key file; a key in PEM form has some 300
MAX_PROOF: Final = 4096  # characters; ours have some 600
# The members of a public key, in the order of RFC 7638 section 3.2, and its algorithm.
_FORMS: Final = {("EC", "P-256"): ("ES256", ("crv", "kty", "x", "y")), ("OKP", "Ed25519"): ("EdDSA", ("crv", "kty", "x"))}
_PRIVATE: Final = frozenset({"d", "k", "p", "q", "dp", "dq", "qi", "oth"})  # RFC 9449 section 4.3, number 7
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_PORTS: Final = {"https": 443, "http": 80}


@cache
def _jws() -> jwt.PyJWS:
    import jwt  # noqa: PLC0415 - keeps `import lacre` fast

    return jwt.PyJWS(algorithms=list(ALGORITHMS))


class ProofKey(StaysInProcess):
    """The application's private key. Register its `thumbprint` with the issuer, or ask for tokens with `proof`.

    Made by `generate`, or read from a PEM file by `load`: an EC key on P-256, or an Ed25519 key.
    """

    _holds = "a private key; pass it on in a file or a secret store"

    def __init__(self, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
        from jwt.algorithms import ECAlgorithm, OKPAlgorithm  # noqa: PLC0415 - keeps `import lacre` fast

        if isinstance(key, Ed25519PrivateKey):
            public = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
        elif isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
            public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        else:
            raise SettingsError(
                "a key for DPoP is an EC key on P-256 or an Ed25519 key: make one with lacre.ProofKey.generate()"
            )
        self._key = key
        self._algorithm, members = _FORMS[public["kty"], public["crv"]]
        self._public = {name: public[name] for name in members}
        self.thumbprint = thumbprint(self._public)

    def __repr__(self) -> str:
        return f"ProofKey(thumbprint={self.thumbprint!r})"

    @classmethod
    def generate(cls) -> Self:
        """A new key on P-256, which every issuer with DPoP accepts."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """path: an unencrypted private key (PEM, PKCS#8 or SEC 1). Raises SettingsError."""
        try:
            with folders.given(path, "path").open("rb") as file:
                key = serialization.load_pem_private_key(file.read(MAX_FILE), password=None)
        except OSError as exc:
            raise SettingsError(f"cannot read the DPoP key in {path} ({exc.strerror})") from exc
        except (ValueError, TypeError) as exc:
            raise SettingsError(f"{path} is not an unencrypted PEM private key") from exc
        return cls(key)  # type: ignore[arg-type]  # the constructor refuses keys of other kinds

    def pem(self) -> bytes:
        """The private key, for a file that only its owner can read."""
        form = serialization.PrivateFormat.PKCS8
        return self._key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    def proof(
        self, method: str, url: str, *, token: str | None = None, request: bytes | None = None, nonce: str | None = None
    ) -> str:
        """The value of a `DPoP` header.

        token: the access token that goes with it; None when asking for one. request: SHA-256 of `hdr ‖ enc` of the sealed
        request. nonce: the value that an issuer sent in `DPoP-Nonce`.
        """
        for name, value in (("method", method), ("url", url), *((("token", token),) if token is not None else ())):
            arguments.text(value, name)
        if request is not None:
            arguments.instance(request, bytes, "request")
        if nonce is not None:
            arguments.text(nonce, "nonce")
        claims: dict[str, Any] = {
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": url.partition("#")[0].partition("?")[0],
            "iat": int(time.time()),
        }
        if token is not None:
            claims["ath"] = token_hash(token)
        if request is not None:
            claims["lacre_req"] = b64u(request)
        if nonce is not None:
            claims["nonce"] = nonce
        payload = json.dumps(claims, separators=(",", ":")).encode()
        return _jws().encode(payload, self._key, algorithm=self._algorithm, headers={"typ": TYP, "jwk": self._public})


@dataclass(frozen=True, slots=True)
class Proof:
    """A verified proof. request: `lacre_req`, if it has one. identity: the same only for the same proof."""

    request: str | None
    identity: bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What a proof must be about. url: in the form of `plain_url`. token_hash: see there. thumbprint: the token's `cnf.jkt`."""

    method: str
    url: str
    token_hash: str
    thumbprint: str


def verify(proof: str, expected: Expected, now: float) -> Proof:
    """Every check of RFC 9449 section 4.3, except the nonce, which we do not use, and whether the proof is new.

    now: seconds since the epoch. Raises ProtocolError or VerificationError.
    """
    import jwt  # noqa: PLC0415 - keeps `import lacre` fast

    if len(proof) > MAX_PROOF:
        raise MessageTooLarge(f"the DPoP proof has over {MAX_PROOF} characters")
    if not _COMPACT.fullmatch(proof):
        raise InvalidMessage("the DPoP proof is not a compact JWS")
    head, payload, _ = proof.split(".")
    key = _key_in(read_object(head), expected.thumbprint)
    try:
        _jws().decode_complete(proof, key, algorithms=[key.algorithm_name])
    except (jwt.PyJWTError, UnicodeError, ValueError, RecursionError) as exc:
        raise InvalidSignature("the DPoP proof is not signed by the key in it") from exc
    said = read_object(payload)
    return _check(Members(said, "the DPoP proof"), "lacre_req" in said, expected, now)


def _key_in(header: dict[str, Any], wanted: str) -> jwt.PyJWK:
    """The key in the header, if it is the one that the token names."""
    import jwt  # noqa: PLC0415 - keeps `import lacre` fast

    jwk = header.get("jwk")
    if header.get("typ") != TYP or "crit" in header or not isinstance(jwk, dict) or not _PRIVATE.isdisjoint(jwk):
        raise InvalidMessage("a DPoP proof must have the type dpop+jwt and a public key, and no critical extension")
    algorithm, members = _FORMS.get((str(jwk.get("kty")), str(jwk.get("crv"))), ("", ()))
    public = {name: jwk.get(name) for name in members}
    if not members or header.get("alg") != algorithm or not all(isinstance(value, str) for value in public.values()):
        raise InvalidMessage(f"a DPoP proof must be signed with one of {', '.join(ALGORITHMS)}")
    if thumbprint(public) != wanted:
        raise VerificationError("the DPoP proof is by another key than the one that the token is bound to")
    try:
        return jwt.PyJWK(public, algorithm)
    except jwt.PyJWTError as exc:
        raise InvalidMessage("the key in the DPoP proof is invalid") from exc


def _check(said: Members, names_request: bool, expected: Expected, now: float) -> Proof:
    jti, method, url = said.text("jti"), said.text("htm"), said.text("htu")
    if not jti or method != expected.method or plain_url(url) != expected.url:
        raise VerificationError("the DPoP proof is for another method or URL")
    if abs(now - said.time("iat")) > WINDOW:
        raise VerificationError(f"the DPoP proof was made more than {WINDOW:.0f} s before or after now")
    if said.text("ath") != expected.token_hash:
        raise VerificationError("the DPoP proof is for another access token")
    identity = hashlib.sha256(f"{expected.thumbprint}\0{jti}".encode("utf-8", "surrogatepass")).digest()
    return Proof(said.text("lacre_req") if names_request else None, identity)


def token_hash(token: str) -> str:
    """`ath` (RFC 9449 section 4.2)."""
    return b64u(hashlib.sha256(token.encode("ascii", "replace")).digest())


def thumbprint(public: dict[str, Any]) -> str:
    """The JWK SHA-256 thumbprint (RFC 7638) of a public key that has only its required members."""
    return b64u(hashlib.sha256(json.dumps(public, separators=(",", ":"), sort_keys=True).encode()).digest())


def plain_url(url: str) -> str:
    """The URL as `htu` is compared: without query and fragment, in the normal form of RFC 3986 sections 6.2.2 and 6.2.3.

    Raises InvalidMessage.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise InvalidMessage("not a URL") from exc
    if parts.scheme not in _PORTS or not host or parts.username is not None:
        raise InvalidMessage("not an HTTP URL")
    authority = f"[{host}]" if ":" in host else host
    port = _PORTS[parts.scheme] if port is None else port
    return f"{parts.scheme}://{authority}:{port}{parts.path or '/'}"
