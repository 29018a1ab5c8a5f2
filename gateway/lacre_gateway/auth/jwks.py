"""The public keys of one issuer (JWKS, RFC 7517), each bound to the algorithms that it may be used with.

Rules:
- Only public, asymmetric signature keys. A set with a private or a symmetric key is refused whole: that key has leaked.
- A key is bound to an algorithm when the set is read. A token can only choose among these pairs.
- An unusable key is ignored and does not affect the others (RFC 7517 section 5). It has an unknown curve, is malformed or too
  short, has another key's `kid`, or has none among several keys. A set without a usable key is refused.
- If two keys have the same `kid` and algorithm, the first counts. The same key twice is one.
- A token without a `kid` can only mean the single key of a set of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from lacre.errors import SettingsError

MAX_FILE: Final = 2**20  # bytes of a JWKS file; a key has some hundred, and a chain of certificates some thousand
MAX_KEYS: Final = 100  # of a set; some issuers have a dozen
# Characters of a text member: an RSA modulus of 16,384 bits has 2,731, and longer numbers take seconds to verify with.
MAX_MEMBER: Final = 2752
# RFC 7517 section 4, RFC 7518 section 6 and RFC 8037 section 2: each of these is text.
_TEXTS: Final = frozenset({"kty", "use", "alg", "kid", "crv", "x", "y", "n", "e"})
MIN_RSA_BITS: Final = 2048  # RFC 7518 section 3.3
_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# By key type and curve (RFC 7518 section 3.4, RFC 8037 section 3.1).
_FITTING: Final[dict[tuple[str, str | None], tuple[str, ...]]] = {
    ("OKP", "Ed25519"): ("EdDSA",),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("RSA", None): _RSA,
}
# Members that make a JWK private or symmetric (RFC 7518 sections 6.2.2, 6.3.2 and 6.4.1; `priv` of ML-DSA's drafts).
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"})


class Unusable(SettingsError):
    """A key of a set that cannot be used."""


class KeySet:
    """Finds the key that a token names. epoch: rises when a key is withdrawn; in this set it never does.

    passed_over: the fault of each unusable key of the set.
    """

    epoch: Final = 0
    usable: Final = True

    def __init__(
        self, keys: Mapping[tuple[str | None, str], jwt.PyJWK], single: bool, passed_over: tuple[str, ...] = ()
    ) -> None:
        self._keys = keys
        self._single = single
        self.passed_over = passed_over

    def __le__(self, other: KeySet) -> bool:
        """Whether the other set has every key of this one, for the same use."""
        return all(name in other._keys and _same(key, other._keys[name]) for name, key in self._keys.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and self._single == other._single and self <= other <= self

    __hash__ = None  # type: ignore[assignment]  # sets are compared, and never looked up

    def find(self, kid: object, alg: object) -> jwt.PyJWK | None:
        """The key of this id, bound to this algorithm; None if there is none."""
        if not isinstance(alg, str) or not (kid is None or isinstance(kid, str)):
            return None
        if kid is None and self._single:
            return next((key for (_, algorithm), key in self._keys.items() if algorithm == alg), None)
        return self._keys.get((kid, alg)) if kid is not None else None

    async def seek(self, _kid: object, _alg: object) -> None:
        """There is no other source to ask."""

    def start(self) -> None:
        """There is nothing to fetch."""

    async def close(self) -> None:
        """Nothing was opened."""

    @classmethod
    def read(cls, source: Path | Mapping[str, Any], algorithms: Sequence[str], place: str) -> Self:
        """source: a JWKS file, or the set itself. place: the settings key, for messages. Raises SettingsError."""
        if isinstance(source, Path):
            try:
                with source.open("rb") as file:
                    content = file.read(MAX_FILE + 1)
                if len(content) > MAX_FILE:
                    raise SettingsError(f"{place}: {source} has over {MAX_FILE} bytes, more than {MAX_KEYS} keys need")
                source = json.loads(content)
            except OSError as exc:
                raise SettingsError(f"{place}: cannot read {source} ({exc.strerror}): write the path of a JWKS file") from exc
            except (ValueError, RecursionError) as exc:
                raise SettingsError(f"{place}: {source} is not JSON: it must hold a JWKS (RFC 7517)") from exc
        return cls.parse(source, algorithms, place)

    @classmethod
    def parse(cls, document: object, algorithms: Sequence[str], place: str) -> Self:
        """Raises SettingsError."""
        members = document.get("keys") if isinstance(document, Mapping) else None
        if not isinstance(members, list) or not members:
            raise SettingsError(f'{place}: a JWKS is an object with a list "keys" of at least one key')
        if len(members) > MAX_KEYS:
            raise SettingsError(f"{place}: a JWKS has at most {MAX_KEYS} keys")
        bound: dict[tuple[str | None, str], jwt.PyJWK] = {}
        unusable: list[Unusable] = []
        for number, member in enumerate(members):
            try:
                fitting = _bind(member, algorithms, f"{place}: key {number}")
                _check_names(fitting, bound, len(members), f"{place}: key {number}")
            except Unusable as exc:
                unusable.append(exc)
            else:
                bound |= {(key.key_id, key.algorithm_name): key for key in fitting}
        if unusable and not bound:
            raise unusable[0]
        if not bound:
            raise SettingsError(
                f"{place}: no key fits the algorithms {', '.join(algorithms)}: pin the ones that the issuer signs with"
            )
        return cls(bound, len(members) == 1, tuple(map(str, unusable)))


def _check_names(keys: Sequence[jwt.PyJWK], bound: Mapping[tuple[str | None, str], jwt.PyJWK], count: int, place: str) -> None:
    """Raises Unusable if no token could mean this key. bound: the keys before it. count: of the whole set."""
    for key in keys:
        if key.key_id is None and count > 1:
            raise Unusable(f"{place}: has no kid: in a set of several keys, each needs one")
        before = bound.get((key.key_id, key.algorithm_name))
        if before is not None and not _same(key, before):
            raise Unusable(f"{place}: is a second key of the same kid: give each its own")


def _same(one: jwt.PyJWK, other: jwt.PyJWK) -> bool:
    same: bool = one.key == other.key
    return same


def _operations(member: Mapping[str, Any], place: str) -> Sequence[object]:
    """The operations that the key is for (RFC 7517 section 4.3). Raises Unusable."""
    operations = member.get("key_ops", ["verify"])
    if not isinstance(operations, list):
        raise Unusable(f"{place}: key_ops must be a list (RFC 7517 section 4.3)")
    return operations


def _bind(member: object, algorithms: Sequence[str], place: str) -> list[jwt.PyJWK]:
    """The key, once for each pinned algorithm that it fits; nothing for an encryption key or one that fits none.

    Raises Unusable, or SettingsError for a fault of the whole set.
    """
    if not isinstance(member, dict):
        raise Unusable(f"{place}: must be a JSON object")
    if not _PRIVATE.isdisjoint(member) or member.get("kty") == "oct":
        raise SettingsError(f"{place}: holds a private or symmetric key: replace it at the issuer, and list only public ones")
    for name in _TEXTS & member.keys():
        if not isinstance(member[name], str) or len(member[name]) > MAX_MEMBER:
            raise Unusable(f"{place}: {name} must be text of at most {MAX_MEMBER} characters (RFC 7517 section 4)")
    if member.get("use", "sig") != "sig" or "verify" not in _operations(member, place):
        return []
    curve = member.get("crv") if member.get("kty") != "RSA" else None
    fitting = _FITTING.get((str(member.get("kty")), curve))
    if fitting is None:
        raise Unusable(f"{place}: is of an unknown type or curve (RFC 7517 section 5)")
    usable = [name for name in fitting if name in algorithms and member.get("alg", name) == name]
    try:
        keys = [jwt.PyJWK(member, algorithm) for algorithm in usable]
    except Exception as exc:  # the only place where PyJWT reads foreign members; they can make it raise anything
        raise Unusable(f"{place}: is not a valid JWK (RFC 7517): copy it from the issuer again") from exc
    for key in keys:
        if isinstance(key.key, RSAPublicKey) and key.key.key_size < MIN_RSA_BITS:
            raise Unusable(f"{place}: is an RSA key of fewer than {MIN_RSA_BITS} bits: replace it at the issuer")
    return keys
