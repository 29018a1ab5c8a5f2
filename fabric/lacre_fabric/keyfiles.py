"""Files that hold secrets: 0600, replaced atomically, refused when others can read them."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError


def write_secret(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; nobody else can read it at any moment, and a crash leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 from the start
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a crash
    finally:
        os.close(folder)


def read_secret(path: Path) -> bytes:
    """Raises SettingsError where the file is missing, or readable for group or others."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise SettingsError(f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}")
            return file.read()
    except OSError as exc:
        raise SettingsError(f"cannot read the key file {path}: {exc.strerror}. `lacre keys init` makes key files") from exc


def write_ed25519(path: Path, key: Ed25519PrivateKey) -> None:
    """As unencrypted PKCS#8 PEM (RFC 8410)."""
    write_secret(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def read_ed25519(path: Path) -> Ed25519PrivateKey:
    """Raises SettingsError."""
    content = read_secret(path)
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
