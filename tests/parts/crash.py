"""Changes the keys of a site, and ends the process at each of its steps on disk, one after another: what is left must work.

`python -m parts.crash CHANGE FOLDER`, CHANGE being one of `CHANGES`; prints how many steps there were. A process of its own,
for it forks.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lacre.jose.jws import raw_public_key
from lacre.trust.chain import verify
from lacre_backend.keyring import KeyRing
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.operate import rotation
from lacre_fabric.operate.site import Site

POOL = "default"
CRASHED = 9
LIFETIME = 86400.0


def rotate_signer(site: Site, now: float) -> None:
    site.authority.rotate_signer(now)
    site.sign_manifest(now)
    site.published(now)


def rotate_root(site: Site, now: float) -> None:
    site.authority.rotate_root(now)
    site.sign_manifest(now)
    site.published(now)


def rotate_keys(site: Site, now: float) -> None:
    """As `rotation.rotate` and `rotation.retire` do it, without a fabric."""
    rotation._staged(site, POOL)
    site.keep_generations(POOL, site.generations(POOL).list_staged(now, 0))
    site.sign_manifest(now)
    site.published(now)
    rotation._destroy(site, POOL, now)


CHANGES: dict[str, Callable[[Site, float], None]] = {"signer": rotate_signer, "root": rotate_root, "keys": rotate_keys}


def crash(site: Site, change: Callable[[Site, float], None], now: float, step: int) -> bool:
    """Runs `change` up to its `step`-th step on disk; False where it has no so many."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, CRASHED), code
        return code == CRASHED
    left = step

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event in ("os.rename", "os.remove") or (
            event == "open" and bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR))
        )  # type: ignore[call-overload]
        if writes and str(site.folder) in str(arguments[0]):
            if left == 0:
                os._exit(CRASHED)
            left -= 1

    sys.addaudithook(hook)
    change(site, now)
    os._exit(0)


def check(site: Site, first: bytes, now: float) -> None:
    """The site publishes what clients believe, and workers have the private key of all that it lists."""
    document = site.sign_manifest(now)
    listed = {key.config for key in verify(document, first, now).manifest.pools[POOL].keys}
    held = KeyRing(site.keys_folder(POOL))
    assert listed
    assert listed <= {key.config for key in held.keys.values()}


def check_tidy(site: Site) -> None:
    """Nothing is left of keys that are over."""
    chain, names = site.authority.chain(), {path.name for path in site.folder.iterdir()}
    assert not [path for path in site.folder.rglob(".*") if {".pem", ".key"} & set(path.suffixes)]
    assert {name for name in names if name.endswith(".pem")} == {"root.pem", "signer.pem", "issuer.pem"}
    assert raw_public_key(read_ed25519(site.folder / "root.pem")) == chain.roots[-1]
    assert raw_public_key(read_ed25519(site.folder / "signer.pem")) == chain.signer
    live = {f"{key_id}.key" for generation in site.generations(POOL).live for key_id in generation.ids}
    assert {path.name for path in pool_keys.files(site.keys_folder(POOL))} == live


def main(name: str, folder: Path) -> None:
    change, now = CHANGES[name], time.time()
    original = Site(folder / "original", {POOL: ("m",)})
    original.create()
    first = original.root
    check(original, first, now)
    step = 0
    crashed = True
    while crashed:
        site = Site(folder / "copy", {POOL: ("m",)})
        shutil.copytree(original.folder, site.folder)
        crashed = crash(site, change, now, step)
        check(site, first, now)
        change(site, now + 1)
        check(site, first, now + 1)
        site.published(now + 1)
        check_tidy(site)
        shutil.rmtree(site.folder)
        step += 1
    print(step)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
