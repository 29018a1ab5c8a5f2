"""A pool's private keys as files, for its workers: `NUMBER.key`, each one generation. Gateways never load this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_fabric.keyfiles import read_secret, write_secret

_SUFFIX: Final = ".key"
MAX_KEY_ID: Final = 255  # one byte (RFC 9458 section 3); generations wrap around long after an old one was destroyed


def load(folder: Path) -> Mapping[int, PrivateKey]:
    """Every generation in `folder`, by key id. Raises SettingsError."""
    keys = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        key = PrivateKey.from_bytes(read_secret(path))
        keys[key.config.key_id] = key
    if not keys:
        raise SettingsError(f"{folder} holds no pool key: `lacre keys init` makes one")
    return keys


def create(folder: Path, kems: tuple[Kem, ...] = (Kem.XWING, Kem.X25519)) -> None:
    """A first key of each kind where there is none yet; the manifest lists them in this order."""
    if any(folder.glob(f"*{_SUFFIX}")):
        return
    for number, kem in enumerate(kems, start=1):
        write_secret(folder / f"{number}{_SUFFIX}", PrivateKey.generate(number, kem).to_bytes())
