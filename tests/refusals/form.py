"""The form of the shared cases: bytes as JSON, edits of a payload, and what both SDKs say of a case.

bytes     text; {"hex": "…"}; {"of": bytes, "times": 1000}; or a list of these, joined
said      {"is": …} if the client accepts it, else {"python": "Expired", "javascript": "ExpiredError"}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import takewhile
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import LacreError

Packed: TypeAlias = "str | dict[str, Any] | list[Any]"
Said: TypeAlias = dict[str, Any]
Case: TypeAlias = dict[str, Any]
_RUN: Final = re.compile(rb"(.)\1{499,}", re.DOTALL)

# The names of the JavaScript errors. The npm package has one class where the SDK tells several causes apart.
JAVASCRIPT: Final = {
    "InvalidMessage": "TrustError", "InvalidSignature": "TrustError", "UntrustedRoot": "UntrustedRootError",
    "MessageTooLarge": "TrustError", "NewerFormat": "NewerFormatError", "Expired": "ExpiredError", "Rollback": "RollbackError",
    "InvalidReceipt": "InvalidReceiptError", "WrongModel": "WrongModelError", "InvalidAudit": "InvalidAuditError",
    "SettingsError": "ConfigurationError",
}  # fmt: skip
IN_MESSAGES: Final = {
    "InvalidMessage": "MalformedError", "MessageTooLarge": "TooLargeError", "OpenError": "AlteredError",
    "TruncatedStream": "TruncatedError",
}  # fmt: skip


@cache
def key(name: str) -> Ed25519PrivateKey:
    """The same key for a name each time, so that the files are the same each time. Nothing but these tests may trust one."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"lacre tests {name}".encode()).digest())


def packed(data: bytes) -> Packed:
    """Long runs of one byte are shortened."""
    parts, at = [], 0
    for run in _RUN.finditer(data):
        parts += [_plain(data[at : run.start()]), {"of": _plain(run.group(1)), "times": len(run.group())}]
        at = run.end()
    parts = [part for part in [*parts, _plain(data[at:])] if part != ""]
    return parts[0] if len(parts) == 1 else parts or ""


def _plain(data: bytes) -> Packed:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}
    return text if text.isprintable() or not text else {"hex": data.hex()}


def unpacked(value: Packed) -> bytes:
    if isinstance(value, list):
        return b"".join(map(unpacked, value))
    if isinstance(value, str):
        return value.encode()
    return bytes.fromhex(value["hex"]) if "hex" in value else unpacked(value["of"]) * value["times"]


def edit(before: str, after: str) -> dict[str, Any]:
    """What makes `after` of `before`: `put` stands at `at`, in the place of `cut` characters."""
    at = _alike(before, after)
    kept = min(_alike(before[::-1], after[::-1]), min(len(before), len(after)) - at)
    return {"at": at, "cut": len(before) - kept - at, "put": after[at : len(after) - kept]}


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def edited(before: str, change: Mapping[str, Any]) -> str:
    return before[: change["at"]] + change["put"] + before[change["at"] + change["cut"] :]


def said(judge: Callable[[], Any], names: Mapping[str, str] = JAVASCRIPT) -> Said:
    """What the SDK says: its answer, or its error with the one of the npm package."""
    try:
        return {"is": judge()}
    except LacreError as exc:
        name = type(exc).__name__
        return {"python": name, "javascript": names[name]}
