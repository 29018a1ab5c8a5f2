"""A backup of a state folder and of the fabric's stores, in one encrypted file; and its restore.

Rules:
- The file is encrypted: with a passphrase, in the age format (https://age-encryption.org/v1), or with a data key that a KMS
  wraps. It holds every private key of the site, so nothing of it is ever written unencrypted.
- It holds neither queues nor claims, which live for seconds or minutes, nor NATS' own files, logs and audit logs.
- A restore writes a folder beside, reads it back, and renames it: a crash or a full disk leaves no half of a state folder. It
  never replaces a folder.
- Names and sizes in the file are checked before anything is written: a damaged or forged file writes nothing outside.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Final

from lacre import __version__
from lacre.errors import InvalidMessage, NewerFormat, SettingsError
from lacre.jose.claims import Members
from lacre.jose.formats import MEMBER, Format
from lacre.runtime import private_files
from lacre.runtime.json_objects import parse_object
from lacre_fabric.keys import kms
from lacre_fabric.keys.kms.envelope import is_sealed, seal, unseal
from lacre_fabric.keys.kms.protocol import EncryptionContext
from lacre_fabric.operate import stores
from lacre_fabric.operate.stores import StoredEntry

BACKUP: Final = Format("backup", "command")  # its version is in the member `format`
MAX_BACKUP: Final = 1 << 30  # bytes: it is made and opened in memory; a state folder has some hundred KB
MIN_PASSPHRASE: Final = 12  # characters; the key derivation (scrypt) makes each guess cost a second
_AGE: Final = b"age-encryption.org/v1\n"
_CONTEXT: Final = EncryptionContext("backup", "")
# Not of the state: NATS' own files, logs, the audit logs, sockets and locks, and a token that expires.
_LEFT_OUT: Final = frozenset({"nats", "logs", "lock", "env", "health"})
_AUDIT: Final = PurePosixPath("gateway/audit")
# age opens only what it expects this machine to derive the key of within 16 s. It measures that each time: a busy machine seems
# slow, and may have seemed fast when the backup was made.
_OPENINGS: Final = 10
_BETWEEN: Final = 0.3  # seconds
_TOO_MUCH_WORK: Final = "Excessive work parameter"
_TOO_SLOW: Final = (
    "the backup does not open here: this machine is too busy, or much slower than the one that made it; try again later"
)
_DAMAGED: Final = "the backup is damaged or not one: restore another file"


@dataclass(frozen=True, slots=True)
class Backup:
    """The content of a backup. made_at: seconds since the epoch. files: by their paths in the state folder.

    entries: of the fabric's stores; None if the fabric was not asked.
    """

    made_at: float
    files: dict[str, bytes]
    entries: list[StoredEntry] | None

    @classmethod
    def of(cls, folder: Path, entries: list[StoredEntry] | None) -> Backup:
        """Call it inside `Site.changing`. Raises SettingsError."""
        try:
            files = {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}
        except OSError as exc:
            raise SettingsError(f"cannot read {exc.filename}: {exc.strerror}") from exc
        return cls(time.time(), files, entries)

    def encode(self) -> bytes:
        about = {"format": BACKUP.version, "made_at": self.made_at, "version": __version__, "fabric": self.entries is not None}
        members = {"backup.json": json.dumps(about).encode()}
        if self.entries is not None:
            members["fabric.json"] = json.dumps({"entries": [one.members() for one in self.entries]}).encode()
        members |= {f"state/{name}": content for name, content in self.files.items()}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
        return packed.getvalue()

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Backup:
        """Raises SettingsError."""
        try:
            members = dict(_unpacked(data))
            about = Members(parse_object(members.pop("backup.json"), "the backup"), "the backup")
            BACKUP.check({MEMBER: about.count("format")})
            entries = stores.parse_entries(members.pop("fabric.json")) if "fabric.json" in members else None
            made_at = about.time("made_at")
        except NewerFormat as exc:
            raise SettingsError(str(exc)) from exc
        except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, zlib.error, InvalidMessage) as exc:
            raise SettingsError(_DAMAGED) from exc
        return cls(made_at, {name.removeprefix("state/"): content for name, content in members.items()}, entries)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = PurePosixPath(path.relative_to(folder).as_posix())
        left_out = inside.parts[0] in _LEFT_OUT or path.name in _LEFT_OUT or path.name.startswith(".")
        if not left_out and not inside.is_relative_to(_AUDIT) and path.is_file() and not path.is_symlink():
            yield path


def _unpacked(data: bytes | bytearray) -> Iterator[tuple[str, bytes]]:
    """Raises ValueError for a name that leads outside, and for more bytes than a backup may have."""
    gzip = zlib.decompressobj(wbits=31)
    plain = gzip.decompress(data, MAX_BACKUP)
    if not gzip.eof:
        raise ValueError("the archive is cut off, or has more bytes than a backup may have")
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
        for entry in archive:
            name = PurePosixPath(entry.name)
            inside = not name.is_absolute() and ".." not in name.parts and "\0" not in entry.name
            known = entry.name in ("backup.json", "fabric.json") or (name.parts[:1] == ("state",) and len(name.parts) > 1)
            content = archive.extractfile(entry) if entry.isreg() and inside and known else None
            if content is None:
                raise ValueError("a member of the archive is none of a backup's")
            yield entry.name, content.read()


def encrypted(content: bytes, *, passphrase: str | None, address: str | None) -> bytes:
    """With either of both. Raises SettingsError or KmsError."""
    if len(content) > MAX_BACKUP:
        raise SettingsError(f"the state folder has over {MAX_BACKUP} bytes: move what is not of Lacre out of it")
    if address is not None:
        service = _service(address)
        try:
            return seal(service, content, _CONTEXT)
        finally:
            service.close()
    if passphrase is None or len(passphrase) < MIN_PASSPHRASE:
        raise SettingsError(f"the passphrase needs {MIN_PASSPHRASE} characters or more: it protects every key of the site")
    return bytes(_age().encrypt(content, passphrase))


def decrypted(data: bytes, *, passphrase: str | None, address: str | None) -> bytes:
    """Raises SettingsError or KmsError."""
    if is_sealed(data):
        if address is None:
            raise SettingsError("the backup is encrypted with a KMS: name its key with --kms")
        service = _service(address)
        try:
            return bytes(unseal(service, data, _CONTEXT))
        finally:
            service.close()
    if not data.startswith(_AGE):
        raise SettingsError(_DAMAGED)
    if passphrase is None:
        raise SettingsError("the backup is encrypted with a passphrase: name its file with --passphrase-file")
    age = _age()
    left = _OPENINGS
    while True:
        try:
            return bytes(age.decrypt(data, passphrase))
        except import_module("pyrage").DecryptError as exc:
            if not str(exc).startswith(_TOO_MUCH_WORK):
                raise SettingsError("the backup does not open: the passphrase is wrong, or the file is damaged") from exc
            left -= 1
            if not left:
                raise SettingsError(_TOO_SLOW) from exc
        time.sleep(_BETWEEN)


def _age() -> ModuleType:
    """Raises SettingsError if the library is not installed."""
    try:
        return import_module("pyrage.passphrase")
    except ImportError as exc:
        raise SettingsError("a backup with a passphrase needs an extra: pip install 'lacre[backup]'") from exc


def _service(address: str) -> kms.Kms:
    service = kms.connect(address)
    if service is None:
        raise SettingsError("a backup is always encrypted: name the key of a KMS, or give a passphrase")
    return service


def save(path: Path, data: bytes) -> None:
    """Writes a new file that only this user can read, whole or not at all. Raises SettingsError."""
    try:
        private_files.create(path, data)
    except FileExistsError as exc:
        raise SettingsError(f"{path} exists already: name another file") from exc
    except OSError as exc:
        raise SettingsError(f"cannot write {path}: {exc.strerror}") from exc


def read(path: Path) -> bytes:
    """Raises SettingsError."""
    try:
        if path.stat().st_size > 2 * MAX_BACKUP:
            raise SettingsError(_DAMAGED)
        return path.read_bytes()
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc


def restore(backup: Backup, folder: Path) -> None:
    """Makes the state folder, and leaves the stores' entries in it for the next provisioning. Raises SettingsError."""
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is not empty: name another folder with --state, or move this one away")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name, content in backup.files.items():
                path = beside / name
                for parent in reversed(path.relative_to(beside).parents):
                    (beside / parent).mkdir(exist_ok=True, mode=0o700)
                private_files.create(path, content)
            if backup.entries is not None:
                stores.keep_pending(beside, backup.entries)
            os.replace(beside, folder)  # noqa: PTH105 - a folder replaces an empty one only in this way
            private_files.sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as exc:
        raise SettingsError(f"cannot restore to {folder}: {exc.strerror}") from exc
