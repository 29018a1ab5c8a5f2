"""What a key management service does for Lacre, and how it fails.

Rules:
- A service wraps *data keys*, and never sees what they seal: neither a pool's key nor anything that was sent to the pool.
- What was wrapped under one context opens under no other one.
- No error repeats what a service answered: it names the key, and what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from lacre.errors import LacreError, SettingsError, VerificationError

DATA_KEY: Final = 32  # bytes: AES-256

Purpose = Literal["pool-key", "receipt-key"]


@dataclass(frozen=True, slots=True)
class EncryptionContext:
    """What a wrapped key is for. generation: the pool key's id, of which each generation has its own; 0 for a receipt key.

    It is no secret: services write it into their own logs.
    """

    purpose: Purpose
    pool: str
    generation: int = 0

    def members(self) -> dict[str, str]:
        return {"generation": str(self.generation), "pool": self.pool, "purpose": self.purpose}

    def encode(self) -> bytes:
        """The one form of it, as associated data."""
        return json.dumps(self.members(), sort_keys=True, separators=(",", ":")).encode()


class Kms(Protocol):
    """One key of one service. scheme: of its address. binds: whether the service itself holds what it wraps to its context.

    Where it does not, the envelope does (see `envelope`). `wrap` and `unwrap` may take seconds, and raise KmsError or
    SettingsError.
    """

    scheme: str
    binds: bool

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes: ...

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        """The data key; overwrite it after use."""

    def close(self) -> None: ...


class KmsError(LacreError):
    """A key management service did not do what it was asked. retryable: whether the same may succeed later by itself."""

    remedy = "Look at the service's own log: it says who asked for what."
    retryable = False


class KeyWithheld(KmsError):
    """The service does not give the key: it is revoked, disabled, destroyed, or not this process's to use."""

    remedy = (
        "Enable the key, or its version, for this process again. Where it was revoked on purpose: remove what it wrapped "
        "from the pool's folder, and make new keys with `lacre keys rotate`."
    )

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class WrongWrapping(KmsError, VerificationError):
    """Wrapped by another key, for another pool or generation, or altered since."""

    remedy = "See that `kms` names the service that wrapped it, and that the file is the pool's own; or restore the file."

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class KmsUnreachable(KmsError):
    """The service cannot be reached, or is too busy."""

    remedy = "See that the service runs and can be reached from here, and try again."
    retryable = True

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class ExtraMissing(SettingsError):
    """What a service needs is not installed."""

    def __init__(self, extra: str) -> None:
        super().__init__(f"this key management service needs an extra: pip install 'lacre[{extra}]'")
