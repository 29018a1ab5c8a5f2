"""What was checked, as a document: `client.verification`, `reply.verification`, and on every error out of a client.

It says with what each check was made, so that it can be shown, logged or compared; it holds no secret. A member that is None
was not checked: nothing had come yet that it could be checked on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lacre.errors import LacreError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre.trust.chain import Trusted
from lacre.trust.manifest import PoolKey, fingerprint


@dataclass(frozen=True, slots=True)
class Signed:
    """A manifest that verified. Times are seconds since the epoch.

    root: the last root of the chain from the pinned one; signer: the key that it names; both base64url, Ed25519.
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
    """The pool's key that the request was sealed to, by its fingerprint, and until when it may be sealed to."""

    pool: str
    key: str
    kem: str
    not_after: float

    @classmethod
    def of(cls, pool: str, key: PoolKey) -> SealedTo:
        return cls(pool, fingerprint(key.config), key.config.kem.label, key.not_after)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked of one exchange, or of none yet.

    pinned: the root key of the connection string, base64url. manifest, sealed_to: None until there were any.
    receipt: the pool's, for this request. audit: the gateway's proof, under its checkpoint, that it recorded this request.
    """

    pinned: str
    manifest: Signed | None = None
    sealed_to: SealedTo | None = None
    receipt: Receipt | None = None
    audit: AuditProof | None = field(default=None, repr=False)

    @staticmethod
    def of(error: LacreError) -> Verification | None:
        """What had been checked by the time of a client's error. None if the error came before any exchange."""
        return error.verification if isinstance(error.verification, Verification) else None

    def members(self) -> dict[str, Any]:
        """As JSON's objects. Of the audit proof, what its entry says and where it stands."""
        parts = {"manifest": self.manifest, "sealed_to": self.sealed_to}
        shown = {
            name: None if part is None else {slot: getattr(part, slot) for slot in part.__slots__}
            for name, part in parts.items()
        }
        receipt = None if self.receipt is None else self.receipt.members()
        audit = None if self.audit is None else {"index": self.audit.index, "entry": self.audit.members}
        return {"pinned": self.pinned, **shown, "receipt": receipt, "audit": audit}
