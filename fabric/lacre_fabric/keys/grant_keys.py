"""Replaces the gateways' signing key: for grants, and for checkpoints of audit logs.

    gateway/grant.pem         the keys, one PEM block after the other; a gateway signs with the one that the manifest names
    gateway/grant_keys.json   while there are two: which one is in use, and when the other one leaves

Rules:
- The new key is staged: in the file, and in the manifest as another valid one. Workers accept it before any gateway uses it.
- Then the manifest names it as the one in use. A gateway that does not have it yet signs with the old one, which stays valid.
- The old key's time begins with that manifest, and not before: a manifest that could not be published is published later.
- When its time is over, the old key leaves the manifest and the file.
- Every step is saved before the next, and may be repeated: another run continues it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, raw_public_key
from lacre_fabric.keys.secret_files import destroy, read_ed25519s, read_secret, write_ed25519s, write_secret

_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class _Switched:
    """in_use: the public key that gateways sign with. leave_at: when the others leave, in seconds since the epoch. grace: the
    seconds until then, while no manifest that names `in_use` first was published; None: one was.
    """

    in_use: bytes
    leave_at: float
    grace: float | None = None

    def due(self, now: float) -> bool:
        return self.grace is None and now >= self.leave_at


@dataclass(frozen=True, slots=True)
class GrantKeys:
    """folder: the state folder. Methods raise SettingsError."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "gateway" / "grant.pem"

    @property
    def _state(self) -> Path:
        return self.folder / "gateway" / "grant_keys.json"

    def public(self) -> tuple[bytes, ...]:
        """What a manifest lists: first the key in use, then the others."""
        known = tuple(map(raw_public_key, read_ed25519s(self.file)))
        switched = self._read()
        if switched is None or switched.in_use not in known:
            return known
        return (switched.in_use, *(key for key in known if key != switched.in_use))

    @property
    def staged(self) -> bytes | None:
        """The public part of a new key that is not in use yet."""
        keys = self.public()
        return keys[1] if len(keys) > 1 and self._read() is None else None

    @property
    def leaving(self) -> float | None:
        """When the old key leaves, in seconds since the epoch; None if none is to. It is later if no manifest says so yet."""
        switched = self._read()
        return None if switched is None else switched.leave_at

    @property
    def unpublished(self) -> bool:
        """Whether no published manifest names the key in use as that yet."""
        switched = self._read()
        return switched is not None and switched.grace is not None

    def stage(self) -> bytes:
        """Adds a new key, or returns the one that an earlier try added. No old key may be leaving."""
        if (staged := self.staged) is not None:
            return staged
        key = Ed25519PrivateKey.generate()
        write_ed25519s(self.file, [*read_ed25519s(self.file), key])
        return raw_public_key(key)

    def switch(self, now: float, grace: float) -> None:
        """The staged key is in use from the next manifest on. The others leave `grace` seconds after its publication."""
        if (staged := self.staged) is not None:
            self._write(_Switched(staged, now + grace, grace))
            self._put_first(staged)

    def published(self, now: float) -> None:
        """Call it once a manifest of these keys is on the fabric."""
        switched = self._read()
        if switched is not None and switched.grace is not None:
            self._write(_Switched(switched.in_use, now + switched.grace))

    def due(self, now: float) -> bool:
        """Whether an old key is to leave."""
        switched = self._read()
        return switched is not None and switched.due(now)

    def to_publish(self, now: float) -> bool:
        """Whether a manifest is due: an old key is to leave, or the key in use was not published as that."""
        return self.unpublished or self.due(now)

    def settle(self, now: float) -> None:
        """Drops old keys whose time is over. Call it before a manifest is signed."""
        switched = self._read()
        if switched is not None and switched.due(now):
            kept = [key for key in read_ed25519s(self.file) if raw_public_key(key) == switched.in_use]
            if not kept:
                raise SettingsError(f"{self.file} lacks the key that is in use: restore it from a backup")
            write_ed25519s(self.file, kept)
            destroy(self._state)

    def _put_first(self, public: bytes) -> None:
        """An older version reads the first key alone."""
        keys = sorted(read_ed25519s(self.file), key=lambda key: raw_public_key(key) != public)
        write_ed25519s(self.file, keys)

    def _read(self) -> _Switched | None:
        if not self._state.exists():
            return None
        try:
            members = Members.parse(read_secret(self._state), "the file")
            grace = members.time("grace") if "grace" in members else None
            return _Switched(members.octets("in_use", _KEY_BYTES), members.time("leave_at"), grace)
        except InvalidMessage as exc:
            raise SettingsError(f"{self._state} is damaged ({exc}): restore it from a backup") from exc

    def _write(self, switched: _Switched) -> None:
        members = {"in_use": b64u(switched.in_use), "leave_at": switched.leave_at}
        grace = {} if switched.grace is None else {"grace": switched.grace}
        write_secret(self._state, json.dumps(members | grace).encode())
