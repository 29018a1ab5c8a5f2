"""A token issuer with a key of each kind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.example"
AUDIENCE = "lacre-test"


class Issuer:
    """Signs access tokens with any algorithm; publishes what verifies the honest ones."""

    def __init__(self) -> None:
        self.ed = Ed25519PrivateKey.generate()
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.keys: dict[str, tuple[Any, str]] = {
            "ed": (self.ed, "EdDSA"),
            "ec": (self.ec, "ES256"),
            "rsa": (self.rsa, "RS256"),
        }

    def jwks(self) -> dict[str, Any]:
        members = [
            {**OKPAlgorithm.to_jwk(self.ed.public_key(), as_dict=True), "kid": "ed"},
            {**ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True), "kid": "ec"},
            {**RSAAlgorithm.to_jwk(self.rsa.public_key(), as_dict=True), "kid": "rsa", "use": "sig", "alg": "RS256"},
        ]
        return {"keys": members}

    def token(self, *, kid: str = "ed", headers: Mapping[str, Any] | None = None, drop: str = "", **claims: Any) -> str:
        key, algorithm = self.keys[kid]
        return jwt.encode(self.claims(drop=drop, **claims), key, algorithm=algorithm, headers={"kid": kid, **(headers or {})})

    def claims(self, *, drop: str = "", **claims: Any) -> dict[str, Any]:
        now = int(time.time())
        standard = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now - 5, "exp": now + 600, "tenant": "acme"}
        return {name: value for name, value in {**standard, **claims}.items() if name != drop}
