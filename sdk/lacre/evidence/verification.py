"""Every check as a document: `client.verification`, `reply.verification`, and on every error of a client.

It names the keys and values of each check, so that a program can show, log or compare it; it holds no secret. A member that is
None was not checked, because nothing to check had arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lacre.errors import LacreError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre.runtime import arguments
from lacre.trust.chain import Trusted
from lacre.trust.manifest import PoolKey, fingerprint


@dataclass(frozen=True, slots=True)
class Signed:
    """A verified manifest. Times are seconds since the epoch.

    root: the last root of the chain from the pinned one. signer: the key that it names. Both are base64url of Ed25519 keys.
    age: seconds since the manifest was signed, by this clock.
    """

    root: str
    signer: str
    signer_expires_at: float
    issuer: str
    version: int
    issued_at: float
    expires_at: float
    age: float

    @classmethod
    def of(cls, trusted: Trusted, now: float) -> Signed:
        last, manifest = trusted.steps[-1], trusted.manifest
        return cls(
            root=b64u(last.root),
            signer=b64u(last.statement.signer),
            signer_expires_at=last.statement.expires_at,
            issuer=manifest.issuer,
            version=manifest.version,
            issued_at=manifest.issued_at,
            expires_at=manifest.expires_at,
            age=max(0.0, now - manifest.issued_at),
        )


@dataclass(frozen=True, slots=True)
class SealedTo:
    """The pool's key that the request was sealed to, by its fingerprint, and until when clients may use it."""

    pool: str
    key: str
    kem: str
    not_after: float

    @classmethod
    def of(cls, pool: str, key: PoolKey) -> SealedTo:
        return cls(pool, fingerprint(key.config), key.config.kem.label, key.not_after)


@dataclass(frozen=True, slots=True)
class Verification:
    """The checks of one exchange, or of none yet.

    pinned: the root key of the connection string, base64url. manifest, sealed_to: None before there were any. receipt: the
    pool's, for this request. audit: the gateway's proof, under its checkpoint, that it recorded this request.
    """

    pinned: str
    manifest: Signed | None = None
    sealed_to: SealedTo | None = None
    receipt: Receipt | None = None
    audit: AuditProof | None = field(default=None, repr=False)

    @staticmethod
    def of(error: LacreError) -> Verification | None:
        """The checks made before a client's error. None if the error came before any exchange. Raises UsageError."""
        arguments.instance(error, LacreError, "error")
        return error.verification if isinstance(error.verification, Verification) else None

    def members(self) -> dict[str, Any]:
        """As JSON objects. Of the audit proof: the entry's content and its place in the log."""
        parts = {"manifest": self.manifest, "sealed_to": self.sealed_to}
        shown = {
            name: None if part is None else {slot: getattr(part, slot) for slot in part.__slots__}
            for name, part in parts.items()
        }
        receipt = None if self.receipt is None else self.receipt.members()
        audit = None if self.audit is None else {"index": self.audit.index, "entry": self.audit.members}
        return {"pinned": self.pinned, **shown, "receipt": receipt, "audit": audit}
