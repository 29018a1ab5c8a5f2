"""Changes the keys of a site, and ends the process at each of its steps on disk, one after another: what is left must work.

`python -m parts.crash CHANGE FOLDER`, CHANGE being one of `CHANGES`, or `rewrap`; prints how many steps there were. A process
of its own, for it forks.
"""

from __future__ import annotations

import itertools
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
from lacre_fabric.keys.kms.wrapping import keeping
from lacre_fabric.keys.secret_files import ed25519_pem, read_ed25519
from lacre_fabric.operate import rotation
from lacre_fabric.operate.rewrapping import rewrap
from lacre_fabric.operate.site import Site

POOL = "default"
CRASHED = 9
PLAIN = "plain:"  # the address of no key


def rotate_authority(rotate: Callable[[Site], Callable[[float], object]]) -> Callable[[Site, float], None]:
    """rotate: the method of a site's authority."""

    def change(site: Site, now: float) -> None:
        rotate(site)(now)
        site.sign_manifest(now)
        site.published(now)

    return change


def rotate_keys(site: Site, now: float) -> None:
    """As `rotation.rotate` and `rotation.retire` do it, without a fabric."""
    rotation._staged(site, POOL)
    site.keep_generations(POOL, site.generations(POOL).list_staged(now, 0))
    site.sign_manifest(now)
    site.published(now)
    rotation._destroy(site, POOL, now)


def replace_receipts(site: Site, now: float) -> None:
    """As `rotate_keys`, for staged keys that get a new receipt key. What a crash left of one is completed."""
    rotation._staged(site, POOL)
    staged = rotation._staged(site, POOL, receipts=True)
    own = {pool_keys.public_receipt_key(pool_keys.receipt_file(site.keys_folder(POOL), number)) for number in staged.ids}
    assert len(own) == 1
    site.keep_generations(POOL, site.generations(POOL).list_staged(now, 0))
    site.sign_manifest(now)
    site.published(now)
    rotation._destroy(site, POOL, now)


CHANGES: dict[str, Callable[[Site, float], None]] = {
    "signer": rotate_authority(lambda site: site.authority.rotate_signer),
    "root": rotate_authority(lambda site: site.authority.rotate_root),
    "keys": rotate_keys,
    "receipts": replace_receipts,
}


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
        opened = event == "open" and bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR))  # type: ignore[call-overload]
        writes = opened or event in ("os.rename", "os.remove")
        if writes and str(site.folder) in str(arguments[0]):
            if left == 0:
                os._exit(CRASHED)
            left -= 1

    sys.addaudithook(hook)
    change(site, now)
    os._exit(0)


def check(site: Site, first: bytes, now: float) -> None:
    """The site publishes what clients believe, and workers have the private keys of all that it lists."""
    document = site.sign_manifest(now)
    pool = verify(document, first, now).manifest.pools[POOL]
    listed = {key.config for key in pool.keys}
    held = KeyRing(site.keys_folder(POOL))
    assert listed
    assert listed <= {key.config for key in held.keys.values()}
    own = {number: raw_public_key(key) for number, key in held.receipt_keys.items()}
    shared = pool_keys.public_receipt_key(site.receipt_file(POOL))
    assert all(pool.receipt_key_of(one.key_id) == own.get(one.key_id, shared) for one in listed)


def unfinished(site: Site) -> list[Path]:
    """Drafts of keys."""
    return [path for path in site.folder.rglob(".*") if {".pem", ".key", ".receipt"} & set(path.suffixes)]


def check_tidy(site: Site) -> None:
    """Nothing is left of keys that are over."""
    chain, names = site.authority.chain(), {path.name for path in site.folder.iterdir()}
    assert not unfinished(site)
    assert {name for name in names if name.endswith(".pem")} == {"root.pem", "signer.pem", "issuer.pem"}
    assert raw_public_key(read_ed25519(site.folder / "root.pem")) == chain.roots[-1]
    assert raw_public_key(read_ed25519(site.folder / "signer.pem")) == chain.signer
    live = {f"{key_id}.key" for generation in site.generations(POOL).live for key_id in generation.ids}
    assert {path.name for path in pool_keys.files(site.keys_folder(POOL))} == live
    assert {f"{path.stem}.key" for path in pool_keys.receipt_files(site.keys_folder(POOL))} <= live


def everywhere(original: Site, change: Callable[[Site, float], None], now: float, check: Callable[[Site], None]) -> int:
    """Ends a copy of the site at every step of `change`, one after another. check: what a copy must do then. The steps."""
    step, crashed = 0, True
    while crashed:
        site = Site(original.folder.with_name("copy"), {POOL: ("m",)})
        shutil.copytree(original.folder, site.folder)
        crashed = crash(site, change, now, step)
        check(site)
        shutil.rmtree(site.folder)
        step += 1
    return step


def made(folder: Path, kms: str = PLAIN) -> Site:
    original = Site(folder / "original", {POOL: ("m",)})
    if kms != PLAIN:
        original.choose_kms(kms)
    original.create()
    return original


def changed(folder: Path, change: Callable[[Site, float], None]) -> int:
    now, original = time.time(), made(folder)
    first = original.root
    check(original, first, now)

    def works(site: Site) -> None:
        check(site, first, now)
        change(site, now + 1)
        check(site, first, now + 1)
        site.published(now + 1)
        check_tidy(site)

    return everywhere(original, change, now, works)


def secrets_of(site: Site, address: str) -> dict[str, bytes]:
    """Every key of the pool, by its file's name."""
    with keeping(address, POOL) as kept:
        keys = {path.name: bytes(pool_keys.read(path, kept).to_bytes()) for path in pool_keys.files(site.keys_folder(POOL))}
        receipt_key = pool_keys.read_receipt_key(site.receipt_file(POOL), kept)
    return keys | {"receipt.pem": ed25519_pem(receipt_key)}


def rewrapped(folder: Path, source: str, target: str) -> int:
    """Moves the keys to another wrapping: no key is lost, and the next run ends it."""
    original = made(folder, source)
    before = secrets_of(original, source)
    assert len(before) == 3

    def change(site: Site, _now: float = 0.0) -> None:
        list(rewrap(site, source, target))

    def works(site: Site) -> None:
        change(site)
        assert secrets_of(site, target) == before
        assert site.kms == target
        assert not unfinished(site)

    steps = everywhere(original, change, 0.0, works)
    shutil.rmtree(original.folder)
    return steps


def main(name: str, folder: Path) -> int:
    if name != "rewrap":
        return changed(folder, CHANGES[name])
    ring = [PLAIN, *(f"file:{folder / name}" for name in ("a.kms", "b.kms")), PLAIN]
    return sum(rewrapped(folder, source, target) for source, target in itertools.pairwise(ring))


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
