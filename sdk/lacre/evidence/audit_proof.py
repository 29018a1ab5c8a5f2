"""The gateway's proof that it recorded a request: the entry, its place in the audit log, and a signed checkpoint.

It comes with the answer, in the header `Lacre-Audit`. `AuditProof.text` is a C2SP tlog-proof to keep: `lacre audit
check-receipt` checks it against the log, today or in a year.

Rules:
- The entry must say what the client itself sent and asked for, or the proof is useless to it: `of_answer` compares.
- Verification needs only the bytes and the manifest's `gateway_key`, or another of its `gateway_keys`.
- It does not prove that every client sees the same log. That takes comparing checkpoints (docs/audit.md).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from lacre.errors import InvalidAudit, InvalidMessage, LacreError, MessageTooLarge
from lacre.evidence import checkpoints, merkle
from lacre.evidence.checkpoints import Checkpoint
from lacre.runtime import arguments
from lacre.runtime.json_objects import object_in, parse_object

HEADER: Final = "lacre-audit"
# An entry, a path and a checkpoint in base64 need less, however long a caller's name is. nginx and Node accept as much.
MAX_HEADER: Final = 8 * 1024
MAX_INTENT: Final = 4096  # bytes of an entry that a header carries
_MAX_TEXT: Final = 128 * 1024  # of a proof in a file
_FIRST_LINE: Final = "c2sp.org/tlog-proof@v1"
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,14}")


@dataclass(frozen=True, slots=True)
class AuditProof:
    """An entry of an audit log, its index, its inclusion proof, and the checkpoint (a signed note) that it leads to."""

    entry: bytes
    index: int
    path: merkle.Path = field(repr=False)
    checkpoint: bytes = field(repr=False)

    def verify(self, key: bytes) -> Checkpoint:
        """Checks that the log of this key holds the entry. key: the manifest's `gateway_key`. Raises InvalidAudit."""
        arguments.instance(key, bytes, "key")
        try:
            checkpoint = checkpoints.verify(self.checkpoint, key)
            merkle.verify_inclusion(merkle.leaf_hash(self.entry), self.index, checkpoint.size, self.path, checkpoint.root)
        except LacreError as exc:
            raise InvalidAudit(f"the gateway's audit proof does not hold ({exc}): tell its operator, and keep it") from exc
        return checkpoint

    @property
    def members(self) -> dict[str, Any]:
        """The entry's content. Raises InvalidAudit if it is not a JSON object, or repeats a member: readers would differ."""
        try:
            return parse_object(self.entry, "the audit entry", once=True)
        except InvalidMessage as exc:
            raise InvalidAudit(str(exc)) from exc

    def header(self) -> str:
        """A Dictionary of RFC 9651."""
        path, note = b"".join(self.path), self.checkpoint
        return f"index={self.index}, entry=:{_b64(self.entry)}:, path=:{_b64(path)}:, checkpoint=:{_b64(note)}:"

    @classmethod
    def parse_header(cls, value: str) -> Self:
        """Ignores unknown members. Raises InvalidMessage or MessageTooLarge, and UsageError if `value` is not a string."""
        arguments.instance(value, str, "value")
        if len(value) > MAX_HEADER:
            raise MessageTooLarge(f"the Lacre-Audit header has over {MAX_HEADER} characters")
        members = dict(member.strip(" \t").partition("=")[::2] for member in value.split(","))
        try:
            entry, path, note = (_octets(members[name]) for name in ("entry", "path", "checkpoint"))
            return cls(entry, _index(members["index"]), _path(path), note)
        except KeyError as exc:
            raise InvalidMessage("the Lacre-Audit header lacks index, entry, path or checkpoint") from exc

    def text(self) -> str:
        """The proof as a file: C2SP tlog-proof, with the entry as its `extra`."""
        lines = [_FIRST_LINE, f"extra {_b64(self.entry)}", f"index {self.index}", *map(_b64, self.path)]
        return "\n".join(lines) + "\n\n" + self.checkpoint.decode()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the output of `text`. Raises InvalidMessage or MessageTooLarge, and UsageError if it is not a string."""
        arguments.instance(text, str, "text")
        if len(text) > _MAX_TEXT:
            raise MessageTooLarge("the audit proof is too long")
        head, _, note = text.partition("\n\n")
        first, extra, index, *path = head.split("\n") if head.count("\n") >= 2 else ("", "", "")
        if first != _FIRST_LINE or not extra.startswith("extra ") or not index.startswith("index "):
            raise InvalidMessage(f"not an audit proof: it begins with {_FIRST_LINE}, extra (the entry) and index")
        hashes = b"".join(_decoded(line) for line in path)
        try:
            return cls(_decoded(extra[6:]), _index(index[6:]), _path(hashes), note.encode())
        except UnicodeEncodeError as exc:  # lone surrogates: a lenient reader makes them from bytes that are not UTF-8
            raise InvalidMessage("the audit proof is not UTF-8") from exc


def of_answer(header: str, keys: Sequence[bytes], expected: Mapping[str, object]) -> AuditProof:
    """The proof of one answer: made by the gateway, for an entry that says what the client sent.

    header: its value; empty if there is none. keys: the manifest's `gateway_keys`; one of them signed. expected: members of the
    entry. Raises InvalidAudit.
    """
    if not header:
        raise InvalidAudit(
            "the answer has no proof that it was recorded: check whether a proxy drops the header Lacre-Audit; if none does, "
            "update the gateway, or tell its operator"
        )
    try:
        proof = AuditProof.parse_header(header)
    except LacreError as exc:
        raise InvalidAudit("the gateway's Lacre-Audit is malformed: tell its operator") from exc
    _verified(proof, keys)
    members = proof.members
    if "enc" in expected and members.get("enc") != expected["enc"]:
        raise _of_another(proof)
    for name, value in expected.items():
        told = members.get(name)
        if told != value or isinstance(told, bool) is not isinstance(value, bool):  # to Python, true is 1
            raise InvalidAudit(f"the gateway recorded another {name} than was sent: tell its operator, and keep the proof")
    return proof


def _verified(proof: AuditProof, keys: Sequence[bytes]) -> None:
    """Raises InvalidAudit, with what is wrong by the first key."""
    try:
        proof.verify(keys[0])
    except InvalidAudit:
        if not any(_holds(proof, key) for key in keys[1:]):
            raise


def _holds(proof: AuditProof, key: bytes) -> bool:
    try:
        proof.verify(key)
    except InvalidAudit:
        return False
    return True


def _of_another(proof: AuditProof) -> InvalidAudit:
    """The gateway proves that it recorded a different request. That may well not be its fault."""
    error = InvalidAudit(
        "this is the answer to another request: this program or a proxy mixes up connections. "
        f"The received proof is of entry {proof.index}"
    )
    error.remedy = (
        "Ask again. If it fails again, check whether processes share a connection, or a proxy is in between. "
        "If neither is the case, tell the gateway's operator."
    )
    return error


def speaks_for(token: str) -> dict[str, object]:
    """The members of an entry that the bearer token itself names; none if the client cannot read it as a JWT."""
    claims = _claims(token)
    named = {"subject": claims.get("sub"), "issuer": claims.get("iss")}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def expires(token: str) -> float | None:
    """When the token says that it expires (RFC 7519 section 4.1.4); None if it does not say so readably."""
    told = _claims(token).get("exp")
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) and 0 < told < 2**53 else None


def _claims(token: str) -> dict[str, object]:
    """The claims of a JWT, unverified: it is the client's own. Empty if it cannot be read."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        said = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        return {}
    return object_in(said) or {}


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _octets(item: str) -> bytes:
    """A Byte Sequence of RFC 9651 section 3.3.5."""
    if len(item) < 2 or item[0] != ":" or item[-1] != ":":
        raise InvalidMessage("not a byte sequence of a structured field")
    return _decoded(item[1:-1])


def _decoded(text: str) -> bytes:
    """Only the one canonical spelling, as in a checkpoint."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise InvalidMessage("not base64") from exc
    if _b64(data) != text:
        raise InvalidMessage("not canonical base64")
    return data


def _index(text: str) -> int:
    if not _INDEX.fullmatch(text):
        raise InvalidMessage("an index is a decimal number")
    return int(text)


def _path(hashes: bytes) -> merkle.Path:
    if len(hashes) % merkle.HASH_BYTES or len(hashes) > merkle.MAX_PATH * merkle.HASH_BYTES:
        raise InvalidMessage("a path is up to 40 hashes of 32 bytes")
    return tuple(hashes[at : at + merkle.HASH_BYTES] for at in range(0, len(hashes), merkle.HASH_BYTES))
