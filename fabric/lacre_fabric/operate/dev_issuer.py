"""The development issuer: access tokens for your own machine. A real deployment has an OIDC provider instead."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose.jws import b64u, raw_public_key

ISSUER: Final = "urn:lacre:development"
AUDIENCE: Final = "lacre"
LIFETIME: Final = 86400.0  # seconds


def key_id(key: Ed25519PrivateKey) -> str:
    return b64u(raw_public_key(key)[:12])


def key_set(key: Ed25519PrivateKey) -> dict[str, Any]:
    """The public key as a JWK set (RFC 7517; RFC 8037)."""
    public = {"kty": "OKP", "crv": "Ed25519", "x": b64u(raw_public_key(key)), "kid": key_id(key), "alg": "EdDSA", "use": "sig"}
    return {"keys": [public]}


def issue(
    key: Ed25519PrivateKey,
    subject: str,
    *,
    tenant: str = "development",
    groups: Sequence[str] = (),
    scopes: Sequence[str] = (),
    lifetime: float = LIFETIME,
    bound_to: str | None = None,
    now: float | None = None,
) -> str:
    """An access token (JWT, RFC 7519). lifetime: seconds. bound_to: the thumbprint of the key that must prove it (RFC 9449)."""
    now = time.time() if now is None else now
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "tenant": tenant,
        "groups": list(groups),
        "scope": " ".join(scopes),
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now + lifetime),
        "jti": secrets.token_hex(16),
    }
    if bound_to is not None:
        claims["cnf"] = {"jkt": bound_to}
    return jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": key_id(key), "typ": "at+jwt"})
