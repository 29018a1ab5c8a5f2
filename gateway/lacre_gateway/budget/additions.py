"""Additions to ceilings: an administrator raises one limit of one budget, for the rest of its window.

Rules:
- An addition is signed by the key that all gateways of a site share, together with its budget, limit and window. Who has only a
  credential for the store can write additions into its own part of a record, and they count for nothing.
- Additions are never taken back. A gateway that does not know one yet gives out less, never more.
- An addition has a number, and counts once, however often and wherever it was written.
- A new signing key ends all additions of the old one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u, b64u_decode, raw_public_key
from lacre_fabric.native.ed25519 import verifies
from lacre_gateway.budget.plans import LimitKind

MAX_ADDITIONS: Final = 32  # to one limit in one window, by one gateway: people make them, and checking each takes 0.1 ms
# Neither a grant (base64url) nor a checkpoint (text) holds a zero byte: no signature of one kind can pass for another.
_CONTEXT: Final = b"lacre budget addition 1\0"
_CHECKED: Final = 4096  # signatures that are remembered as checked

Limit = tuple[LimitKind, int]  # a kind, and the number of a window
Check = Callable[[Limit, str, "Addition"], bool]


@dataclass(frozen=True, slots=True)
class Addition:
    """amount: by which the ceiling rises. signature: base64url."""

    amount: int
    signature: str


Additions = Mapping[Limit, Mapping[str, Addition]]  # by number


def nothing_counts(_limit: Limit, _number: str, _addition: Addition) -> bool:
    """The check of somebody who does not know the gateways' key."""
    return False


class Approver:
    """Signs and checks additions. key: the gateways'; the private one is needed only to sign."""

    def __init__(self, key: Ed25519PrivateKey | None, public: bytes | None = None) -> None:
        assert key is not None or public is not None  # noqa: S101 - a mistake of the program
        self._key = key
        self._publics: tuple[bytes, ...] = (raw_public_key(key) if key is not None else public or b"",)

    def use(self, key: Ed25519PrivateKey, publics: Sequence[bytes]) -> None:
        """Signs with this key from now on, and accepts additions of all of these."""
        self._key, self._publics = key, tuple(publics)

    def sign(self, budget: str, limit: Limit, number: str, amount: int) -> Addition:
        assert self._key is not None  # noqa: S101 - a mistake of the program
        return Addition(amount, b64u(self._key.sign(_signed(budget, limit, number, amount))))

    def check(self, budget: str) -> Check:
        """The check of this budget's additions."""

        def genuine(limit: Limit, number: str, addition: Addition) -> bool:
            message = _signed(budget, limit, number, addition.amount)
            return any(_verified(public, message, addition.signature) for public in self._publics)

        return genuine


def _signed(budget: str, limit: Limit, number: str, amount: int) -> bytes:
    kind, window = limit
    return _CONTEXT + json.dumps([budget, kind.value, window, number, amount], separators=(",", ":")).encode()


@lru_cache(maxsize=_CHECKED)
def _verified(public: bytes, message: bytes, signature: str) -> bool:
    try:
        return verifies(public, b64u_decode(signature), message)
    except InvalidMessage:
        return False


def encode(additions: Additions) -> dict[str, dict[str, dict[str, list[int | str]]]]:
    """As the record's JSON has them."""
    found: dict[str, dict[str, dict[str, list[int | str]]]] = {}
    for (kind, window), kept in additions.items():
        found.setdefault(kind.value, {})[str(window)] = {name: [each.amount, each.signature] for name, each in kept.items()}
    return found


def parse(found: Mapping[str, Mapping[str, Mapping[str, tuple[int, str]]]]) -> Additions:
    """Skips limits of unknown kinds. Raises ValueError, TypeError, KeyError or AttributeError."""
    return {
        (LimitKind(kind), int(window)): {name: _addition(*values) for name, values in kept.items()}
        for kind, windows in found.items()
        if kind in frozenset(LimitKind)  # a newer gateway may have limits of further kinds
        for window, kept in windows.items()
    }


def _addition(amount: object, signature: object) -> Addition:
    if type(amount) is not int or not 0 < amount <= 2**63 or not isinstance(signature, str):
        raise ValueError("not an addition")
    return Addition(amount, signature)
