"""Checkpoints of a transparency log: C2SP tlog-checkpoint in a C2SP signed note, by Ed25519.

    <origin>            which log: unique among those that one key signs for
    <size>              how many entries, decimal
    <root>              the Merkle tree's root over them, base64
    (empty line)
    — <origin> <base64 of key id(4) ‖ signature(64)>

Rules:
- A note is read only if the signature by the expected key holds. Other signatures in it (of witnesses) are ignored.
- The log's own signature is by a key whose name is the origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from lacre.errors import InvalidMessage, InvalidSignature, MessageTooLarge
from lacre.evidence.merkle import HASH_BYTES, MAX_LEAVES
from lacre.jose.ed25519 import Signs, verifies

MAX_NOTE: Final = 16 * 1024  # bytes: a checkpoint with sixteen signatures, even if some are post-quantum ones of witnesses
_ED25519: Final = b"\x01"
_DASH: Final = "— "
_KEY_ID_BYTES: Final = 4
# Key names hold no space and no plus sign; our origins are visible ASCII.
_ORIGIN: Final = re.compile(r"[!-*,-~]{1,255}")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's promise: its first `size` entries have this root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> bytes:
        """The bytes that the log signs."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()

    def sign(self, key: Signs, identity: bytes) -> bytes:
        """The signed note. identity: `key_id` of this origin and the key's public half, computed once by the caller."""
        text = self.text()
        signature = base64.b64encode(identity + key.sign(text)).decode()
        return text + f"\n{_DASH}{self.origin} {signature}\n".encode()


def key_id(origin: str, public_key: bytes) -> bytes:
    """C2SP signed-note: names a key; it proves nothing."""
    return hashlib.sha256(origin.encode() + b"\n" + _ED25519 + public_key).digest()[:_KEY_ID_BYTES]


def verifier_key(origin: str, public_key: bytes) -> str:
    """The key in the form that other tools for signed notes take: `<name>+<key id in hex>+<base64 of type ‖ key>`."""
    return f"{origin}+{key_id(origin, public_key).hex()}+{base64.b64encode(_ED25519 + public_key).decode()}"


def parse_verifier_key(text: str) -> tuple[str, bytes]:
    """The origin and the 32-byte key. Raises InvalidMessage."""
    name, _, rest = text.strip().partition("+")
    identity, _, encoded = rest.partition("+")
    key = _base64(encoded)
    if not _ORIGIN.fullmatch(name) or len(key) != 33 or key[:1] != _ED25519 or key_id(name, key[1:]).hex() != identity:
        raise InvalidMessage("not a verifier key of the form name+id+key")
    return name, key[1:]


def parse(note: bytes) -> Checkpoint:
    """The content of a note, its signature *not* verified. Raises InvalidMessage or MessageTooLarge."""
    return _parse(note)[0]


def verify(note: bytes, key: bytes) -> Checkpoint:
    """The checkpoint that the log with this key signed. Raises InvalidMessage, MessageTooLarge or InvalidSignature."""
    checkpoint, text, signatures = _parse(note)
    wanted = key_id(checkpoint.origin, key)
    for name, blob in signatures:
        if name != checkpoint.origin or blob[:_KEY_ID_BYTES] != wanted:
            continue
        if not verifies(key, blob[_KEY_ID_BYTES:], text):
            raise InvalidSignature("the signature of the checkpoint does not hold")
        return checkpoint
    raise InvalidSignature("the checkpoint is not signed by the expected key")


def _parse(note: bytes) -> tuple[Checkpoint, bytes, list[tuple[str, bytes]]]:
    """The checkpoint, the text that is signed, and the name and signature of each line."""
    if len(note) > MAX_NOTE:
        raise MessageTooLarge(f"the checkpoint has over {MAX_NOTE} bytes")
    body, blank, rest = note.rpartition(b"\n\n")
    try:
        text, signatures = (body + b"\n").decode("utf-8"), rest.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidMessage("the checkpoint is not UTF-8") from exc
    lines = signatures.split("\n")
    if not blank or lines[-1] or len(lines) < 2 or not all(line.startswith(_DASH) for line in lines[:-1]):
        raise InvalidMessage("not a signed note: no blank line with signatures after it")
    if any(character < " " and character != "\n" for character in text + signatures):
        raise InvalidMessage("the checkpoint holds a control character")
    origin, size, root, *extensions = text[:-1].split("\n") if text.count("\n") >= 3 else ("", "", "")
    digest = _base64(root)
    if not _ORIGIN.fullmatch(origin) or not _SIZE.fullmatch(size) or int(size) > MAX_LEAVES or len(digest) != HASH_BYTES:
        raise InvalidMessage("not a checkpoint: its lines are origin, size and root")
    if not all(extensions):
        raise InvalidMessage("the checkpoint holds an empty line")
    return Checkpoint(origin, int(size), digest), text.encode(), list(map(_signature, lines[:-1]))


def _signature(line: str) -> tuple[str, bytes]:
    """Raises InvalidMessage."""
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not space:
        raise InvalidMessage("a line of signatures must hold a name and base64")
    return name, _base64(encoded)


def _base64(text: str) -> bytes:
    """RFC 4648 section 4, in its one canonical spelling. Raises InvalidMessage."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise InvalidMessage("not base64") from exc
    if base64.b64encode(data).decode() != text:
        raise InvalidMessage("not canonical base64")
    return data
