"""Chats on disk, encrypted: one file each, under a key that this file never writes down as it is.

`$XDG_STATE_HOME/lacre/chats` (0700) has `key.json` and a file `ID.chat` for each chat, all 0600.

Rules:
- Nothing is on disk unless the person turned history on.
- A random data key encrypts the chats: AES-256-GCM with a random nonce, bound to the chat's id. `key.json` holds the data key
  wrapped: under a key in the system's keyring, or under a passphrase by scrypt (RFC 7914).
- Files of others, files that others can read, and changed files are never used. They are reported, and the rest opens.
- An old copy of a file that someone puts back is not noticed: nothing here counts versions.
- Every size is checked before a file is read, and scrypt's cost before it is paid.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from lacre.errors import LacreError, SettingsError
from lacre.runtime import private_files
from lacre.runtime.json_objects import parse_object
from lacre.transport.login import OsKeyring

MAX_CHAT: Final = 8 * 1024 * 1024  # bytes of a chat, its pictures included
MAX_CHATS: Final = 1000
MAX_KEY_FILE: Final = 4096  # bytes
MIN_PASSPHRASE: Final = 8  # characters
MAX_PASSPHRASE: Final = 1024
SCRYPT_N: Final = 2**17  # with r = 8: 128 MiB and about half a second for each guess
MAX_SCRYPT_N: Final = 2**20  # a key file of someone else must not take all memory
_R, _P = 8, 1
_MAGIC: Final = b"lacre-chat-1\n"
_NONCE: Final = 12
_TAG: Final = 16
_FORMAT: Final = "lacre-chats-1"
_FILE: Final = re.compile(r"([0-9a-f]{32})\.chat")
_WRONG: Final = "the passphrase does not open this history: type it again, or delete the history"
_ELSEWHERE: Final = "the system's keyring does not have the key of this history: unlock the keyring, or delete the history"

Kind = Literal["keyring", "passphrase"]
State = Literal["off", "locked", "open"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file in the folder that is not used, and why."""

    name: str
    reason: str


class ChatHistory:
    """One user's. folder: may be missing. keyring: None if the system has none."""

    def __init__(self, folder: Path, keyring: OsKeyring | None, scrypt_n: int = SCRYPT_N) -> None:
        self.folder = folder
        self._keyring = keyring
        self._scrypt_n = scrypt_n
        self._key: bytes | None = None

    @property
    def has_keyring(self) -> bool:
        return self._keyring is not None

    @property
    def state(self) -> State:
        return "open" if self._key is not None else "locked" if self._key_file.is_file() else "off"

    @property
    def kind(self) -> Kind | None:
        """How the key is kept; None if there is no history, or its key file cannot be read."""
        try:
            return _checked_kind(self._read_key_file().get("kind"))
        except LacreError:
            return None

    @property
    def _key_file(self) -> Path:
        return self.folder / "key.json"

    def turn_on(self, kind: Kind, passphrase: str = "") -> None:
        """Makes the key, and keeps chats from now on. Raises SettingsError."""
        if self.state != "off":
            raise SettingsError("there is a history already: open it, or delete it first")
        key, name = secrets.token_bytes(32), secrets.token_hex(16)
        told: dict[str, object]
        if kind == "keyring":
            outer = secrets.token_bytes(32)
            told = {"name": name}
            if self._keyring is None or not self._keyring.write(_entry(name), _b64(outer)):
                raise SettingsError("the system's keyring took no key: choose a passphrase instead")
        else:
            salt = secrets.token_bytes(16)
            outer = _stretched(_checked_passphrase(passphrase), salt, self._scrypt_n)
            told = {"salt": _b64(salt), "n": self._scrypt_n}
        nonce = secrets.token_bytes(_NONCE)
        wrapped = nonce + AESGCM(outer).encrypt(nonce, key, _bound(kind))
        document = {"format": _FORMAT, "kind": kind, **told, "wrapped": _b64(wrapped)}
        with _writing(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            private_files.create(self._key_file, json.dumps(document).encode())
        self._key = key

    def open(self, passphrase: str = "") -> None:
        """Raises SettingsError if the key cannot be opened."""
        document = self._read_key_file()
        kind = _checked_kind(document.get("kind"))
        wrapped = _unb64(document.get("wrapped"), _NONCE + 32 + _TAG)
        if kind == "keyring":
            held = None if self._keyring is None else self._keyring.read(_entry(str(document.get("name"))))
            if held is None:
                raise SettingsError(_ELSEWHERE)
            outer = _unb64(held, 32)
        else:
            outer = _stretched(_checked_passphrase(passphrase), _unb64(document.get("salt"), 16), document.get("n"))
        try:
            self._key = AESGCM(outer).decrypt(wrapped[:_NONCE], wrapped[_NONCE:], _bound(kind))
        except InvalidTag:
            raise SettingsError(_WRONG if kind == "passphrase" else _ELSEWHERE) from None

    def save(self, name: str, content: bytes) -> None:
        """Does nothing unless the history is open. Raises SettingsError."""
        if self._key is None:
            return
        nonce = secrets.token_bytes(_NONCE)
        sealed = _MAGIC + nonce + AESGCM(self._key).encrypt(nonce, content, _of_chat(name))
        with _writing(self.folder):
            private_files.replace(self._path(name), sealed)

    def delete(self, name: str) -> None:
        """Raises SettingsError."""
        with _writing(self.folder):
            self._path(name).unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, bytes], tuple[Unreadable, ...]]:
        """The chats by their ids, and the files that are none of this history's."""
        chats: dict[str, bytes] = {}
        wrong: list[Unreadable] = []
        for path in self._files():
            name = path.name.removesuffix(".chat")
            try:
                if len(chats) >= MAX_CHATS:
                    raise SettingsError(f"there are more than {MAX_CHATS} chats")
                chats[name] = self._decrypted(path, name)
            except SettingsError as exc:
                wrong.append(Unreadable(path.name, str(exc)))
        return chats, tuple(wrong)

    def forget(self) -> None:
        """Deletes the key, then every chat. Raises SettingsError."""
        with suppress(LacreError):
            if self._keyring is not None and self.kind == "keyring":
                self._keyring.forget(_entry(str(self._read_key_file().get("name"))))
        self._key = None
        with _writing(self.folder):
            self._key_file.unlink(missing_ok=True)
            for path in self._files():
                path.unlink(missing_ok=True)

    def _decrypted(self, path: Path, name: str) -> bytes:
        assert self._key is not None  # noqa: S101 - only an open history reads chats
        sealed = _read(path, len(_MAGIC) + _NONCE + MAX_CHAT + _TAG)
        if not sealed.startswith(_MAGIC):
            raise SettingsError("it is not an encrypted chat")
        nonce, rest = sealed[len(_MAGIC) :][:_NONCE], sealed[len(_MAGIC) + _NONCE :]
        try:
            return AESGCM(self._key).decrypt(nonce, rest, _of_chat(name))
        except (InvalidTag, ValueError):
            raise SettingsError("it was changed, or belongs to another history") from None

    def _read_key_file(self) -> dict[str, Any]:
        document = parse_object(_read(self._key_file, MAX_KEY_FILE), f"{self._key_file}")
        if document.get("format") != _FORMAT:
            raise SettingsError(f"{self._key_file} is not the key file of a history: delete the history")
        return document

    def _files(self) -> list[Path]:
        with _writing(self.folder):
            found = self.folder.iterdir() if self.folder.is_dir() else iter(())
            return sorted(path for path in found if _FILE.fullmatch(path.name))

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}.chat"
        if _FILE.fullmatch(path.name) is None:
            raise SettingsError("a chat's id has 32 hexadecimal digits")
        return path


def _read(path: Path, most: int) -> bytes:
    """A private file of this user. Raises SettingsError."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            private_files.check(path, found.st_mode)
            if found.st_size > most:
                raise SettingsError(f"{path} has more than {most} bytes")
            return file.read(most + 1)[:most]
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read ({exc.strerror})") from exc


def _stretched(passphrase: str, salt: bytes, n: object) -> bytes:
    if isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= MAX_SCRYPT_N or n & (n - 1):
        raise SettingsError("the key file of the history names a cost that is not allowed: delete the history")
    return Scrypt(salt, 32, n, _R, _P).derive(passphrase.encode())


def _checked_passphrase(passphrase: str) -> str:
    if not MIN_PASSPHRASE <= len(passphrase) <= MAX_PASSPHRASE:
        raise SettingsError(f"a passphrase has at least {MIN_PASSPHRASE} characters: four random words are good")
    return passphrase


def _checked_kind(kind: object) -> Kind:
    if kind == "keyring" or kind == "passphrase":  # noqa: PLR1714 - so that mypy sees the literals
        return kind
    raise SettingsError("the key of a history is in the keyring, or under a passphrase: the key file says neither")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Maps errors of the disk. Raises SettingsError."""
    try:
        yield
    except OSError as exc:
        raise SettingsError(
            f"the history in {folder} cannot be changed ({exc.strerror}): free space there, or make it writable"
        ) from exc


def _entry(name: str) -> str:
    """The name of the keyring's entry."""
    return f"chats-{name[:64]}"


def _of_chat(name: str) -> bytes:
    """What a chat's encryption is bound to."""
    return _MAGIC + name.encode()


def _bound(kind: Kind) -> bytes:
    return f"{_FORMAT} {kind}".encode()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unb64(text: object, size: int) -> bytes:
    """Raises SettingsError unless the text is base64 of so many bytes."""
    try:
        data = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != size:
        raise SettingsError("the key file of the history was changed: delete the history")
    return data
