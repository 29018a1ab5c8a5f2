"""The interface of a key management service, and how it fails.

Rules:
- A service wraps *data keys* only. It never sees what they seal: neither a pool's key nor any request.
- A key wrapped under one context opens under no other.
- No error repeats the service's answer: it names the key, and what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from lacre.errors import LacreError, SettingsError, VerificationError

DATA_KEY: Final = 32  # bytes: AES-256

Purpose = Literal["pool-key", "receipt-key", "model", "backup"]


@dataclass(frozen=True, slots=True)
class EncryptionContext:
    """The use of a wrapped key. generation: the pool key's id; 0 for a receipt key.

    A model's key belongs to no pool: `pool` is empty, and digest is the model's, `sha256:` and hex. Neither does a backup's.
    It is not secret: services log it.
    """

    purpose: Purpose
    pool: str
    generation: int = 0
    digest: str = ""

    def members(self) -> dict[str, str]:
        if self.purpose == "model":
            return {"digest": self.digest, "purpose": self.purpose}
        if self.purpose == "backup":
            return {"purpose": self.purpose}
        return {"generation": str(self.generation), "pool": self.pool, "purpose": self.purpose}

    def encode(self) -> bytes:
        """The canonical form, for use as associated data."""
        return json.dumps(self.members(), sort_keys=True, separators=(",", ":")).encode()


class Kms(Protocol):
    """One key of one service. scheme: of its address. binds: whether the service itself binds wrapped keys to their context.

    If it does not, the envelope does (see `envelope`). `wrap` and `unwrap` may take seconds, and raise KmsError or
    SettingsError.
    """

    scheme: str
    binds: bool

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes: ...

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        """The data key; overwrite it after use."""

    def close(self) -> None: ...


class KmsError(LacreError):
    """A KMS operation failed. retryable: whether the same operation may succeed later."""

    remedy = "Check the service's own log: it shows who asked for what."
    retryable = False


class KeyWithheld(KmsError):
    """The service refuses the key: it is revoked, disabled or destroyed, or this process may not use it."""

    remedy = (
        "Enable the key, or its version, for this process again. If it was revoked on purpose: remove the files it wrapped "
        "from the pool's folder, then make new keys with `lacre keys rotate`."
    )

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class WrongWrapping(KmsError, VerificationError):
    """Wrapped with another key, or for another pool or generation, or altered since."""

    remedy = "Check that `kms` names the service that wrapped it, and that the file is this pool's. Otherwise restore the file."

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class KmsUnreachable(KmsError):
    """The service is unreachable or too busy."""

    remedy = "Check that the service runs and is reachable from here, then try again."
    retryable = True

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {self.remedy}")


class ExtraMissing(SettingsError):
    """The service's library is not installed."""

    def __init__(self, extra: str) -> None:
        super().__init__(f"this key management service needs an extra: pip install 'lacre[{extra}]'")
