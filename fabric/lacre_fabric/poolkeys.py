"""A pool's private keys as files, for its workers: `NUMBER.key`, one for each key. Gateways never load this.

Rules:
- A key is in the folder exactly as long as it may open requests: workers take up what appears and destroy what disappears.
- Whoever makes a key keeps only its public part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lacre.wire.header import Kem, KeyConfig
from lacre.wire.opening import PrivateKey
from lacre.wire.wiping import overwrite
from lacre_fabric.keyfiles import destroy, destroy_leftovers, read_secret, write_secret

_SUFFIX: Final = ".key"
DEFAULT_KEMS: Final = (Kem.XWING, Kem.X25519)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def read(path: Path) -> PrivateKey:
    """Raises SettingsError."""
    content = read_secret(path)
    try:
        return PrivateKey.from_bytes(content)
    finally:
        overwrite(content)


def make(folder: Path, ids: Sequence[int], kems: Sequence[Kem]) -> tuple[KeyConfig, ...]:
    """New keys, one for each id and its KEM, in files that are complete when this returns. What they are announced as."""
    return tuple(_make(folder, key_id, kem) for key_id, kem in zip(ids, kems, strict=True))


def _make(folder: Path, key_id: int, kem: Kem) -> KeyConfig:
    key = PrivateKey.generate(key_id, kem)
    content = key.to_bytes()
    try:
        write_secret(folder / f"{key_id}{_SUFFIX}", content)
    finally:
        overwrite(content)
        key.destroy()
    return key.config


def public_parts(folder: Path) -> tuple[KeyConfig, ...]:
    """Of the keys in `folder`, in the order of their ids."""
    keys = [read(path) for path in files(folder)]
    for key in keys:
        key.destroy()
    return tuple(sorted((key.config for key in keys), key=lambda config: config.key_id))


def keep_only(folder: Path, ids: Iterable[int]) -> None:
    """Destroys every other key in `folder`, and what a crash left of one."""
    kept = {f"{key_id}{_SUFFIX}" for key_id in ids}
    for path in files(folder):
        if path.name not in kept:
            destroy(path)
    destroy_leftovers(folder, f"*{_SUFFIX}")
