"""Moves a site's keys to another wrapping, and ends the process at each step on disk: no key is lost, and the next run ends it.

`python -m parts.crash_rewrap FOLDER`; prints how many steps there were.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms.wrapping import keeping
from lacre_fabric.keys.secret_files import ed25519_pem
from lacre_fabric.operate.rewrapping import rewrap
from lacre_fabric.operate.site import Site
from parts.crash import POOL, crash


def secrets_of(site: Site, address: str) -> dict[str, bytes]:
    """Every key of the pool, by its file's name."""
    with keeping(address, POOL) as kept:
        keys = {path.name: bytes(pool_keys.read(path, kept).to_bytes()) for path in pool_keys.files(site.keys_folder(POOL))}
        receipt_key = pool_keys.read_receipt_key(site.receipt_file(POOL), kept)
    return keys | {"receipt.pem": ed25519_pem(receipt_key)}


def main(folder: Path) -> None:
    addresses = ["plain:", *(f"file:{folder / name}" for name in ("a.kms", "b.kms"))]
    total = 0
    for source, target in ((0, 1), (1, 2), (2, 0)):
        total += _everywhere(folder, addresses[source], addresses[target])
        shutil.rmtree(folder / "original")
    print(total)


def _everywhere(folder: Path, source: str, target: str) -> int:
    original = Site(folder / "original", {POOL: ("m",)})
    if source != "plain:":
        original.choose_kms(source)
    original.create()
    before = secrets_of(original, source)
    assert len(before) == 3
    step, crashed = 0, True
    while crashed:
        site = Site(folder / "copy", {POOL: ("m",)})
        shutil.copytree(original.folder, site.folder)
        crashed = crash(site, lambda site, _now: list(rewrap(site, source, target)) and None, 0.0, step)
        list(rewrap(site, source, target))
        assert secrets_of(site, target) == before
        assert site.kms == target
        assert not [path for path in site.folder.rglob(".*") if {".pem", ".key"} & set(path.suffixes)]
        shutil.rmtree(site.folder)
        step += 1
    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
