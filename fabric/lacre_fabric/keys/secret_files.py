"""Files that hold secrets: 0600, replaced atomically, refused when others can read them, and destroyed when they are over.

A file of root's may be readable for one group that this process is in (0440): so a kubelet hands secrets to a pod's user, which
can neither own nor change them.

What is read comes back in a `bytearray`: whoever asked overwrites it after use.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.runtime import private_files
from lacre.runtime.private_files import sync_folder, write_all
from lacre.wire.wiping import overwrite


def write_secret(path: Path, content: bytes | bytearray) -> None:
    """Replaces `path` in one step; nobody else can read it at any moment, and a crash leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    private_files.replace(path, content, discard=destroy)


def read_secret(path: Path) -> bytearray:
    """Raises SettingsError where the file is missing, or readable for group or others."""
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
        made = "`lacre up` makes such files, and `lacre keys init` those that hold keys"
        raise SettingsError(f"cannot read {path}: {exc.strerror}. {made}") from exc


def closed_to(owner: int, group: int, *, user: int, groups: Collection[int]) -> int:
    """The bits of a mode by which others than this process could read the file, or change it. owner, group: the file's; the
    rest ours.
    """
    handed_over = owner == 0 != user and group in groups
    return 0o037 if handed_over else 0o077


def replace_by(coming: Path, path: Path) -> None:
    """Puts one file in another's place, in one step; what that held is overwritten once the new one is safe."""
    with path.open("r+b", buffering=0) as old:
        coming.replace(path)
        sync_folder(path.parent)
        write_all(old, bytes(os.fstat(old.fileno()).st_size))


def destroy(path: Path) -> None:
    """Overwrites the file in place, then removes it; where there is none, does nothing.

    In place is as far as a program reaches: a file system that writes elsewhere (copy on write, a log, the flash of an SSD),
    a snapshot or a backup may keep what was there before.
    """
    going = path if path.name.startswith(".") else path.with_name(f".{path.name}.going")
    try:
        path.replace(going)  # first of all it is nobody's key any more: none is ever seen half overwritten
        with going.open("r+b", buffering=0) as file:
            write_all(file, bytes(os.fstat(file.fileno()).st_size))
    except FileNotFoundError:
        return
    going.unlink(missing_ok=True)
    sync_folder(path.parent)


def destroy_leftovers(folder: Path, name: str) -> None:
    """What a crash left of writing or destroying files whose names begin with `name` and a dot. Nobody may be writing them."""
    for path in folder.glob(f".{name}.*"):
        destroy(path)


def write_ed25519(path: Path, key: Ed25519PrivateKey) -> None:
    """As unencrypted PKCS#8 PEM (RFC 8410)."""
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


def ed25519_pem(key: Ed25519PrivateKey) -> bytes:
    """Secret: overwrite it once it is stored."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def parse_ed25519(content: bytes | bytearray, path: Path) -> Ed25519PrivateKey:
    """path: where it was, for messages. Raises SettingsError."""
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except ValueError as exc:
        raise SettingsError(f"{path} is not a PEM private key") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{path} must hold an Ed25519 key")
    return key


def ed25519(path: Path) -> Ed25519PrivateKey:
    """The key in `path`; made there where there is none."""
    if not path.exists():
        write_ed25519(path, Ed25519PrivateKey.generate())
    return read_ed25519(path)
