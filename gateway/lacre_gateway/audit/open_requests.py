"""Which requests of a log have no outcome yet: the file `open`, and how to find out without it.

    {"size": …, "open": [request ids], "signature": Ed25519, base64url}

Rules:
- The file only spares a start from reading the log back to the start before.
- The log's key signs it. Otherwise someone who writes to the disk could make the gateway close requests that never were, or
  forget some. Then its log would no longer hold.
- An event `started` says that no request before it is open. A link says how many are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage
from lacre.jose.ed25519 import verifies
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime.json_objects import object_in
from lacre_gateway.audit import chain
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.entries import Intent, LogLink, Outcome, parse
from lacre_gateway.audit.reader import LogReader


def listed(key: Ed25519PrivateKey, origin: str, size: int, names: Collection[str]) -> bytes:
    """The content of the file. names: the requests without an outcome, at this size of the log."""
    known = list(names)
    signature = key.sign(_signed(origin, size, known))
    return json.dumps({"size": size, "open": known, "signature": b64u(signature)}).encode()


def read(data: bytes, public: bytes, origin: str) -> tuple[int, list[str]] | None:
    """The size and the names. None if the file is damaged, or not signed by this key for this log."""
    state = object_in(data) or {}
    size, names, signature = (state.get(name) for name in ("size", "open", "signature"))
    if not isinstance(size, int) or not isinstance(signature, str):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    try:
        signed = verifies(public, b64u_decode(signature), _signed(origin, size, names))
    except InvalidMessage:
        return None
    return (size, names) if signed else None


def _signed(origin: str, size: int, names: Sequence[str]) -> bytes:
    """Neither a checkpoint, whose second line is a number, nor the input of a JWS, which has one line."""
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return f"lacre audit log, open requests\n{origin}\n{size}\n{digest}\n".encode()


def since(names: Iterable[str], entries: Iterable[bytes]) -> list[str]:
    """The open requests after these entries. names: those before them. Raises Wrong."""
    left = dict.fromkeys(names)
    for data in entries:
        members = parse(data)
        if members["kind"] == Intent.kind:
            left[members["request_id"]] = None
        elif members["kind"] == Outcome.kind:
            left.pop(members["request_id"], None)
    return list(left)


def since_the_start(root: Path, public: bytes) -> list[str]:
    """The same from the logs alone. public: the key of the newest one. Raises Wrong or SettingsError."""
    ended: set[str] = set()
    left: list[str] = []
    for data in _backwards(root, public):
        members = parse(data)
        if members["kind"] == Intent.kind and members["request_id"] not in ended:
            left.append(members["request_id"])
        elif members["kind"] == Outcome.kind:
            ended.add(members["request_id"])
        elif members.get("event") == kinds.STARTED or (members["kind"] == LogLink.kind and members["open"] == 0):
            break
    return left[::-1]


def _backwards(root: Path, public: bytes) -> Iterator[bytes]:
    *old, newest = chain.parts(root, public)
    yield from LogReader(newest.folder, newest.key).backwards()
    for part in reversed(old):
        if part.erased:
            return
        yield from part.reader().backwards()
