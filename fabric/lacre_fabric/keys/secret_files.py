"""Files with secrets: mode 0600, replaced atomically, rejected if others can read them, and overwritten when destroyed.

A file that root owns may also be readable by one group of this process (0440). A kubelet provides secrets to a pod's user this
way; the pod can neither own nor change them.

Secrets are read into a `bytearray`, which the caller overwrites after use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.runtime import private_files
from lacre.runtime.private_files import sync_folder, write_all
from lacre.wire.wiping import overwrite

_BEGIN: Final = b"-----BEGIN PRIVATE KEY-----"  # RFC 7468
_BLOCK: Final = re.compile(_BEGIN + rb".*?-----END PRIVATE KEY-----", re.DOTALL)
_FENCE: Final = re.compile(rb"^-", re.MULTILINE)  # begins both lines around a block, also those that are cut
_REMEDY: Final = "`lacre up` creates such files; `lacre keys init` creates those with keys"


def write_secret(path: Path, content: bytes | bytearray) -> None:
    """Replaces `path` atomically. No other user can read it at any moment, and a crash leaves the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    private_files.replace(path, content, discard=destroy)


def private_folder(folder: Path) -> None:
    """Makes the folder, or takes an existing one away from group and others. Raises SettingsError if that is not permitted.

    A folder of another owner, such as a mounted volume, may be open to a group.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_mode & (0o077 if status.st_uid == os.geteuid() else 0o007):
        try:
            folder.chmod(0o700)
        except OSError as exc:
            raise SettingsError(f"others can read {folder}: its owner must close it with chmod o-rwx") from exc


def read_secret(path: Path, remedy: str = _REMEDY) -> bytearray:
    """remedy: what to do about a file that cannot be read. Raises SettingsError if it is missing, or readable by group or
    others.
    """
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            groups = {os.getegid(), *os.getgroups()}
            private_files.check(path, status.st_mode, closed_to(status.st_uid, status.st_gid, user=os.geteuid(), groups=groups))
            content = bytearray(status.st_size)
            with memoryview(content) as view:
                size = 0
                while size < len(view) and (count := file.readinto(view[size:])):
                    size += count
            return content[:size] if size < len(content) else content
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}. {remedy}") from exc


def closed_to(owner: int, group: int, *, user: int, groups: Collection[int]) -> int:
    """The bits of a mode by which other users could read or change the file.

    owner, group: the file's. user, groups: this process's.
    """
    handed_over = owner == 0 != user and group in groups
    return 0o037 if handed_over else 0o077


def replace_by(coming: Path, path: Path) -> None:
    """Replaces one file by another atomically. Overwrites the old content once the new file is safe."""
    with path.open("r+b", buffering=0) as old:
        coming.replace(path)
        sync_folder(path.parent)
        write_all(old, bytes(os.fstat(old.fileno()).st_size))


def destroy(path: Path) -> None:
    """Overwrites the file in place, then removes it. Does nothing if there is none.

    Old content can survive on a copy-on-write or log-structured file system, on an SSD's flash, in a snapshot or in a backup.
    """
    going = path if path.name.startswith(".") else path.with_name(f".{path.name}.going")
    try:
        path.replace(going)  # rename first: no reader ever sees a half-overwritten key
        with going.open("r+b", buffering=0) as file:
            write_all(file, bytes(os.fstat(file.fileno()).st_size))
    except FileNotFoundError:
        return
    going.unlink(missing_ok=True)
    sync_folder(path.parent)


def destroy_leftovers(folder: Path, name: str) -> None:
    """Destroys what a crash left of files whose names begin with `name` and a dot. No other process may be writing them."""
    for path in folder.glob(f".{name}.*"):
        destroy(path)


def write_ed25519(path: Path, key: Ed25519PrivateKey) -> None:
    """Writes unencrypted PKCS#8 PEM (RFC 8410)."""
    content = ed25519_pem(key)
    try:
        write_secret(path, content)
    finally:
        overwrite(content)


def read_ed25519(path: Path) -> Ed25519PrivateKey:
    """Raises SettingsError."""
    content = read_secret(path)
    try:
        return parse_ed25519(content, path)
    finally:
        overwrite(content)


def read_ed25519s(path: Path) -> tuple[Ed25519PrivateKey, ...]:
    """All keys of a file: one PEM block after the other. Raises SettingsError."""
    content = read_secret(path)
    try:
        blocks = _BLOCK.findall(content)
        if blocks and len(_FENCE.findall(content)) != 2 * len(blocks):
            raise SettingsError(f"{path} is cut off, or holds something else than private keys: copy it again, whole")
        return tuple(parse_ed25519(block, path) for block in blocks) or (parse_ed25519(content, path),)
    finally:
        overwrite(content)


def write_ed25519s(path: Path, keys: Sequence[Ed25519PrivateKey]) -> None:
    """Writes them as `read_ed25519s` reads them."""
    content = bytearray(b"".join(map(ed25519_pem, keys)))
    try:
        write_secret(path, content)
    finally:
        overwrite(content)


def ed25519_pem(key: Ed25519PrivateKey) -> bytes:
    """Secret: overwrite it once it is stored."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def parse_ed25519(content: bytes | bytearray, path: Path) -> Ed25519PrivateKey:
    """path: its file, for messages. Raises SettingsError."""
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except ValueError as exc:
        raise SettingsError(f"{path} is not a PEM private key: copy it again, whole, or restore it from a backup") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{path} must hold an Ed25519 key")
    return key


def ed25519(path: Path) -> Ed25519PrivateKey:
    """The key in `path`; makes one if the file does not exist."""
    if not path.exists():
        write_ed25519(path, Ed25519PrivateKey.generate())
    return read_ed25519(path)
