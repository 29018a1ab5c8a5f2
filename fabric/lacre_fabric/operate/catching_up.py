"""`lacre state catch-up`: a state folder that is behind takes from the fabric what is public: statements, version, key ids.

NATS may have lost its storage too, or have an older manifest. Gateways remember the newest one that they saw, and serve it.

Rules:
- Only a document that this state's first root leads to is taken. Private keys are not on the fabric, and none is invented.
- The newest file is written last: after a crash at any point the same command does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import httpx2

from lacre.errors import SettingsError
from lacre.exchange.call import MANIFEST_PATH
from lacre.jose.jws import raw_public_key
from lacre.runtime.hosts import without_secrets
from lacre.transport.fault_words import fault_in_words
from lacre.trust.chain import MAX_FUTURE, follow
from lacre.trust.manifest import MAX_DOCUMENT, Document, Manifest, fingerprint
from lacre_fabric.keys.root_and_signer import Chain
from lacre_fabric.keys.secret_files import read_ed25519, write_secret
from lacre_fabric.operate import behind
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site

_ANSWER: Final = 10.0  # seconds for a gateway's answer
_NOT_OURS: Final = "the fabric has no manifest that this folder's root leads to: there is nothing to catch up with"


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """version: the newest one that the fabric has. statements: how many were added. todo: what the operator must do now."""

    version: int
    statements: int
    todo: tuple[str, ...]


def served(base_url: str) -> bytes:
    """The document that the gateway serves. Raises SettingsError if it serves none."""
    found = bytearray()
    try:
        with httpx2.Client(timeout=_ANSWER).stream("GET", f"{base_url}{MANIFEST_PATH}") as response:
            for piece in response.raise_for_status().iter_bytes():
                found += piece
                if len(found) > MAX_DOCUMENT:
                    break
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        fault = f"status {exc.response.status_code}" if isinstance(exc, httpx2.HTTPStatusError) else fault_in_words(exc)
        raise SettingsError(f"the gateway at {without_secrets(base_url)} serves no manifest: {fault}") from None
    return bytes(found)


def newest(documents: Sequence[bytes], root: bytes) -> bytes | None:
    """The one with the most statements, then with the highest version. None if `root` leads to none of them."""
    known = [(len(one.chain), one.version, each) for each in documents if (one := behind.of_document(each, root)) is not None]
    return max(known, key=lambda one: one[:2])[2] if known else None


def catch_up(site: Site, published: bytes | None, now: float) -> CaughtUp:
    """Call it inside `site.changing`. now: seconds since the epoch. Raises SettingsError."""
    before = site.authority.chain()
    fabric = None if published is None else behind.of_document(published, before.roots[0])
    if published is None or fabric is None:
        raise SettingsError(_NOT_OURS)
    if fabric.replaced:
        raise SettingsError(f"{behind.REPLACED}: only the newest copy of the folder has the new root")
    steps = follow(fabric.chain, before.roots[0])
    roots = tuple(dict.fromkeys((before.roots[0], *(step.root for step in steps))))
    last = steps[-1].statement
    chain = before
    if before.entries[: len(fabric.chain)] != fabric.chain:
        chain = Chain(roots, last.signer, last.expires_at, fabric.chain)
        site.authority.adopt(chain)
    manifest = behind.manifest_in(Document.parse(published), last.signer)
    todo = [line for line in (_missing_key(site, name, key) for name, key in _named(chain)) if line]
    for pool in site.pools:
        todo += _reserve(site, pool, manifest, now)
    todo += [
        f"add pool {name} to site.json, or accept that the next manifest lacks it"
        for name in manifest.pools.keys() - site.pools
    ]
    write_secret(site.folder / "trust" / "manifest.json", published)
    version = max(manifest.version, _version(site, chain))
    write_secret(site.folder / "trust" / "version", str(version).encode())
    return CaughtUp(manifest.version, max(0, len(chain.entries) - len(before.entries)), tuple(todo))


def _version(site: Site, chain: Chain) -> int:
    try:
        return behind.of_state(site.folder, chain.entries).version
    except SettingsError:  # damaged: the fabric's version replaces it
        return 0


def _named(chain: Chain) -> tuple[tuple[str, bytes], ...]:
    return ("root", chain.roots[-1]), ("signer", chain.signer)


def _missing_key(site: Site, name: str, public_key: bytes) -> str | None:
    path = site.folder / f"{name}.pem"
    try:
        if raw_public_key(read_ed25519(path)) == public_key:
            return None
    except SettingsError:
        pass
    if name == "signer":
        return "put back signer.pem, or make a new signer with `lacre signer rotate`"
    return "put back root.pem, or make a new root with `lacre root replace`"


def _reserve(site: Site, pool: str, manifest: Manifest, now: float) -> list[str]:
    """Keeps the ids of listed keys that are not here from being used again while clients may know them."""
    generations = site.generations(pool)
    own = {fingerprint(config) for one in generations.live for config in one.configs}
    listed = manifest.pools[pool].keys if pool in manifest.pools else ()
    lost = [key.config.key_id for key in listed if fingerprint(key.config) not in own]
    if not lost:
        return []
    spent = {**generations.spent, **dict.fromkeys(lost, now + MANIFEST_LIFETIME + MAX_FUTURE)}
    site.keep_generations(pool, replace(generations, spent=spent))
    ids = ", ".join(map(str, lost))
    return [
        f"pool {pool}: keys {ids} are not in this folder. Put `pools/{pool}` back, or run `lacre keys rotate --pool {pool}`"
    ]
