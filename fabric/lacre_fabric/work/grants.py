"""A grant is the gateway's signed permission for a worker to run one sealed request within limits. It does not name the caller.

It carries two pseudonyms, of the tenant and of the caller, so that workers can share their time fairly. Only the gateway can
resolve them. They change every hour (`lacre_gateway.auth.pseudonyms`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from lacre.errors import Expired, InvalidMessage, InvalidSignature
from lacre.jose import jws
from lacre.jose.ed25519 import Signs
from lacre.jose.formats import Format
from lacre.runtime.records import record
from lacre_fabric.native.ed25519 import verifies
from lacre_fabric.native.json_bytes import read_object, write_object

TYP: Final = "lacre-grant+jwt"
GRANT: Final = Format("grant", "worker")
PSEUDONYM: Final = 16  # bytes; base64url in a grant
_PSEUDONYM: Final = re.compile(r"[A-Za-z0-9_-]{22}")  # fixed length: a worker stores them while the caller's tasks last
MAX_SKEW: Final = 60.0  # seconds that a gateway's clock may run ahead of a worker's


@record(frozen=True, slots=True)
class Grant:
    """The content of a grant.

    - jti: the request id. iat, exp: seconds since the epoch.
    - max_tokens: output tokens over all choices. max_prompt_tokens: the prompt tokens that the gateway reserved.
    - fair: the pseudonyms of tenant and caller.
    - enc: base64url SHA-256 of `hdr ‖ enc`.
    """

    jti: str
    iat: float
    exp: float
    pool: str
    model: str
    action: str
    shape: str
    max_tokens: int
    max_prompt_tokens: int
    features: tuple[str, ...]
    fair: tuple[str, str]
    enc: str

    def members(self) -> dict[str, Any]:
        return {
            "jti": self.jti, "iat": self.iat, "exp": self.exp, "pool": self.pool, "model": self.model, "action": self.action,
            "shape": self.shape, "max_tokens": self.max_tokens, "max_prompt_tokens": self.max_prompt_tokens,
            "features": list(self.features), "fair": list(self.fair), "enc": self.enc,
        }  # fmt: skip

    def sign(self, key: Signs) -> str:
        return jws.sign(self.members(), key, TYP, write_object)

    @classmethod
    def verify(cls, token: str, keys: Sequence[bytes], now: float) -> Grant:
        """keys: the manifest's `gateway_keys`; one of them signed. Raises InvalidMessage, InvalidSignature or Expired."""
        members = GRANT.members(signed_by_one(token, keys, TYP))
        grant = cls(
            jti=members.text("jti"),
            iat=members.time("iat"),
            exp=members.time("exp"),
            pool=members.text("pool"),
            model=members.text("model"),
            action=members.text("action"),
            shape=members.text("shape"),
            max_tokens=members.count("max_tokens"),
            max_prompt_tokens=members.count("max_prompt_tokens"),
            features=members.texts("features"),
            fair=_pair(members.texts("fair")),
            enc=members.text("enc"),
        )
        if now >= grant.exp or grant.iat > now + MAX_SKEW:
            raise Expired("the grant is expired or not valid yet: check the clocks of gateway and worker")
        return grant


def signed_by_one(token: str, keys: Sequence[bytes], typ: str) -> dict[str, Any]:
    """Its members. Raises InvalidMessage or InvalidSignature."""
    for key in keys[:-1]:
        with suppress(InvalidSignature):
            return jws.verify(token, key, typ, read_object, verifies)
    return jws.verify(token, keys[-1], typ, read_object, verifies)


def _pair(pseudonyms: tuple[str, ...]) -> tuple[str, str]:
    """Raises InvalidMessage."""
    if len(pseudonyms) != 2 or not all(map(_PSEUDONYM.fullmatch, pseudonyms)):
        raise InvalidMessage("the grant's `fair` is not two pseudonyms of 22 base64url characters: update the gateway")
    return pseudonyms[0], pseudonyms[1]
