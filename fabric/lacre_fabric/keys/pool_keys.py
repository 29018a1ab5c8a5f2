"""A pool's private keys as files for its workers: one `NUMBER.key` for each key, and once its receipt key was replaced, a
`NUMBER.receipt` beside it (see `receipt_keys`). Gateways never load this module.

Rules:
- A key is in the folder exactly as long as it may open requests. Workers load keys that appear, and destroy keys that
  disappear.
- The process that makes a key keeps only the public part.
- If the pool's keys are wrapped, each is bound to its pool and number (see `kms.wrapping`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.jose.jws import raw_public_key
from lacre.wire.header import Kem, KeyConfig
from lacre.wire.opening import PrivateKey
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.generations import KEY_IDS
from lacre_fabric.keys.kms.envelope import WrappedKey, is_sealed
from lacre_fabric.keys.kms.wrapping import Keeping
from lacre_fabric.keys.secret_files import destroy, destroy_leftovers, ed25519_pem, parse_ed25519, read_ed25519, read_secret

_SUFFIX: Final = ".key"
_RECEIPT: Final = ".receipt"
DEFAULT_KEMS: Final = (Kem.XWING, Kem.X25519)
AS_THEY_ARE: Final = Keeping(None, "")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def number(path: Path) -> int:
    """The key's id, from the file name. Raises SettingsError."""
    if not path.stem.isdecimal():
        raise SettingsError(f"{path} is not a pool key: remove it from this folder")
    return int(path.stem)


def read(path: Path, keeping: Keeping = AS_THEY_ARE) -> PrivateKey:
    """Raises SettingsError or KmsError."""
    content = keeping.read(path, keeping.pool_key(number(path) if keeping.kms else 0))
    try:
        return PrivateKey.from_bytes(content)
    finally:
        overwrite(content)


def make(folder: Path, ids: Sequence[int], kems: Sequence[Kem], keeping: Keeping = AS_THEY_ARE) -> tuple[KeyConfig, ...]:
    """Makes a key for each id and KEM. The files are complete when this returns. Returns the public configurations."""
    return tuple(_make(folder, key_id, kem, keeping) for key_id, kem in zip(ids, kems, strict=True))


def _make(folder: Path, key_id: int, kem: Kem, keeping: Keeping) -> KeyConfig:
    key = PrivateKey.generate(key_id, kem)
    content = key.to_bytes()
    try:
        keeping.write(folder / f"{key_id}{_SUFFIX}", content, keeping.pool_key(key_id))
    finally:
        overwrite(content)
        key.destroy()
    return key.config


def public_parts(folder: Path, keeping: Keeping = AS_THEY_ARE) -> tuple[KeyConfig, ...]:
    """The public parts of the keys in `folder`, ordered by id."""
    keys = [read(path, keeping) for path in files(folder)]
    for key in keys:
        key.destroy()
    return tuple(sorted((key.config for key in keys), key=lambda config: config.key_id))


def complete(folder: Path, kems: Sequence[Kem], keeping: Keeping = AS_THEY_ARE) -> tuple[KeyConfig, ...]:
    """Makes a key for each KEM that has none in `folder`. Returns the public parts of all, ordered by id."""
    there = public_parts(folder, keeping)
    missing = [kem for kem in kems if kem not in {config.kem for config in there}]
    free = [key_id for key_id in KEY_IDS if key_id not in {config.key_id for config in there}]
    return (*there, *make(folder, free[: len(missing)], missing, keeping))


def keep_only(folder: Path, ids: Iterable[int]) -> None:
    """Destroys every other key in `folder`, with its receipt key, and leftovers of a crash."""
    kept = {f"{key_id}{suffix}" for key_id in ids for suffix in (_SUFFIX, _RECEIPT)}
    for path in (*files(folder), *receipt_files(folder)):
        if path.name not in kept:
            destroy(path)
    for suffix in (_SUFFIX, _RECEIPT):
        destroy_leftovers(folder, f"*{suffix}")


def receipt_files(folder: Path) -> list[Path]:
    """The receipt keys that belong to single keys."""
    return sorted(folder.glob(f"*{_RECEIPT}"))


def receipt_file(folder: Path, key_id: int | str) -> Path:
    """Where the receipt key of this key is, if it has one of its own. key_id: also as the name of its file has it."""
    return folder / f"{key_id}{_RECEIPT}"


def make_receipt_key(path: Path, keeping: Keeping) -> None:
    """Makes the key that signs the pool's receipts if there is none. Raises SettingsError or KmsError."""
    if not path.exists():
        make_receipt_keys([path], keeping)


def make_receipt_keys(paths: Sequence[Path], keeping: Keeping) -> None:
    """Writes one new receipt key to all of these files. Raises SettingsError or KmsError."""
    key = Ed25519PrivateKey.generate()
    content = ed25519_pem(key)
    try:
        for path in paths:
            keeping.write(path, content, keeping.receipt_key(), raw_public_key(key))
    finally:
        overwrite(content)


def read_receipt_key(path: Path, keeping: Keeping = AS_THEY_ARE) -> Ed25519PrivateKey:
    """Raises SettingsError or KmsError."""
    content = keeping.read(path, keeping.receipt_key())
    try:
        return parse_ed25519(content, path)
    finally:
        overwrite(content)


def public_receipt_key(path: Path) -> bytes:
    """Reads the public part without asking a KMS: a process that signs manifests needs no right to unwrap.

    Raises SettingsError or KmsError.
    """
    content = read_secret(path)
    if is_sealed(content):
        return WrappedKey.parse(content).public
    overwrite(content)
    return raw_public_key(read_ed25519(path))
