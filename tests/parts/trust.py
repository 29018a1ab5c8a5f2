"""Root keys, statements and manifests, really signed, at a moment of their own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose import jws
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import Document, Manifest, ModelEntry, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey

NOW = 1_800_000_000.0
DAY = 86400.0
ROOTS = [Ed25519PrivateKey.generate() for _ in range(4)]
SIGNER = Ed25519PrivateKey.generate()
KEY = PrivateKey.generate(3, Kem.X25519)
PINNED = raw_public_key(ROOTS[0])


def manifest(version: int = 1, *, issued: float = NOW, expires: float = NOW + DAY) -> Manifest:
    pool = Pool({"tiny": ModelEntry()}, (PoolKey(KEY.config, NOW + DAY),), bytes(32), ("none", "pad"))
    return Manifest("test", version, issued, expires, bytes(32), {"default": pool})


def statement(
    root: Ed25519PrivateKey,
    next_root: Ed25519PrivateKey | None = None,
    *,
    signer: Ed25519PrivateKey = SIGNER,
    exp: float = NOW + 9 * DAY,
) -> tuple[str, ...]:
    following = None if next_root is None else raw_public_key(next_root)
    return sign_statement(RootStatement(raw_public_key(signer), exp, following), root, next_root)


def changes(roots: Sequence[Ed25519PrivateKey] = ROOTS) -> list[tuple[str, ...]]:
    """Each root hands over to the next."""
    return [statement(old, new) for old, new in itertools.pairwise(roots)]


def document(*chain: Sequence[str], of: Manifest | None = None, signer: Ed25519PrivateKey = SIGNER) -> bytes:
    return Document(tuple(map(tuple, chain or [statement(ROOTS[0])])), sign_manifest(of or manifest(), signer)).encode()


def foreign(count: int) -> list[tuple[str, ...]]:
    """So many statements that a root of nobody's has signed, each another one."""
    root = Ed25519PrivateKey.generate()
    return [statement(root, exp=NOW + number) for number in range(count)]


def signature_checks(call: Callable[[], object]) -> int:
    """How many signatures `call` checks in this thread, counted as it runs."""
    checked = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal checked
        checked += event == "call" and frame.f_code is jws.verify.__code__

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return checked
