"""An order to one worker: take no more work, or take work again. A gateway signs it, on behalf of an administrator.

Rules:
- It is signed with the key that signs grants, under a type of its own. So neither is taken for the other.
- It names its worker, its time and its end. A worker obeys none that is older than the newest one that it obeyed.
- It does not name the administrator: the worker learns a request id, by which the gateway's audit log names the person.
- What a stolen signing key can do with it is what it can do without it: keep workers from work. It opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lacre.errors import Expired, InvalidMessage
from lacre.jose import jws
from lacre.jose.ed25519 import Signs
from lacre.jose.formats import Format
from lacre_fabric.native.json_bytes import write_object
from lacre_fabric.work.grants import MAX_SKEW, signed_by_one

TYP: Final = "lacre-worker-order+jwt"
DRAIN_ORDER: Final = Format("worker order", "worker")
LIVES: Final = 30.0  # seconds: a gateway makes a new one for each try
MAX_BYTES: Final = 2048  # of one order
_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class DrainOrder:
    """drain: whether the worker is to take no more work. request_id: of the administrator's call, 32 hex digits. iat, exp:
    seconds since the epoch.
    """

    request_id: str
    iat: float
    exp: float
    pool: str
    region: str
    node: str
    drain: bool

    def members(self) -> dict[str, Any]:
        return {
            "jti": self.request_id, "iat": self.iat, "exp": self.exp, "pool": self.pool, "region": self.region,
            "node": self.node, "drain": self.drain,
        }  # fmt: skip

    def sign(self, key: Signs) -> str:
        return jws.sign(self.members(), key, TYP, write_object)

    @classmethod
    def verify(cls, token: str, keys: Sequence[bytes], now: float) -> DrainOrder:
        """keys: the manifest's `gateway_keys`; one of them signed. Raises InvalidMessage, InvalidSignature or Expired."""
        if len(token) > MAX_BYTES:
            raise InvalidMessage(f"a worker order has at most {MAX_BYTES} bytes")
        members = DRAIN_ORDER.members(signed_by_one(token, keys, TYP))
        order = cls(
            request_id=members.text("jti"), iat=members.time("iat"), exp=members.time("exp"), pool=members.text("pool"),
            region=members.text("region"), node=members.text("node"), drain=members.flag("drain"),
        )  # fmt: skip
        if not _ID.fullmatch(order.request_id):  # it is logged
            raise InvalidMessage("a worker order's `jti` is not a request id")
        if now >= order.exp or order.iat > now + MAX_SKEW or order.exp > order.iat + LIVES:
            raise Expired("the worker order is expired or not valid yet: check the clocks of gateway and worker")
        return order
