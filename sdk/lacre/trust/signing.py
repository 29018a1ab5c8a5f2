"""The signing side of trust: the offline root and the online signer. The verifying side is `lacre.trust.chain`."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import UsageError
from lacre.jose.jws import raw_public_key, sign, sign_bytes
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP, Manifest, RootStatement


def sign_statement(
    statement: RootStatement, root: Ed25519PrivateKey, next_root: Ed25519PrivateKey | None = None
) -> tuple[str, ...]:
    """An entry of the chain: one JWS by `root`, and at a change of root a second one of the same payload by `next_root`."""
    expected = None if next_root is None else raw_public_key(next_root)
    if statement.next_root != expected:
        raise UsageError("a change of root must be signed by the root that it names")
    signers = (root,) if next_root is None else (root, next_root)
    return tuple(sign_bytes(statement.payload(), key, ROOT_TYP) for key in signers)


def sign_manifest(manifest: Manifest, signer: Ed25519PrivateKey) -> str:
    """The manifest as a compact JWS by the signer."""
    return sign(manifest.members(), signer, MANIFEST_TYP)
