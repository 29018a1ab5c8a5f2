"""`lacre state catch-up`: a state folder that is behind takes from the fabric what is public: statements, version, key ids.

NATS may have lost its storage too, or have an older manifest. Gateways remember the newest one that they saw, and serve it. A
worker or an application may have seen more than every gateway: then its memory is read.

Rules:
- Only a document that this state's first root leads to is taken. Private keys are not on the fabric, and none is invented.
- No process is ever talked out of what it saw. The folder takes up every statement and version that was seen, so that what it
  signs next is newer for everyone.
- Statements that two copies of the folder made apart are put in a row, the published ones first. So the folder's chain begins
  with the fabric's. The last one's signer signs next, or `lacre signer rotate` adds another.
- A manifest counts for nothing if another one has all its statements and more: a stolen signer that was replaced could have
  made it.
- The newest file is written last: after a crash at any point the same command does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import httpx2

from lacre.errors import SettingsError, UntrustedRoot
from lacre.exchange.call import MANIFEST_PATH
from lacre.jose.jws import raw_public_key
from lacre.runtime.hosts import without_secrets
from lacre.transport.fault_words import fault_in_words
from lacre.trust.chain import MAX_FUTURE, Entry, Step, follow
from lacre.trust.manifest import MAX_DOCUMENT, Document, Manifest, fingerprint
from lacre.trust.manifest_store import VersionFile
from lacre_fabric.keys.root_and_signer import Chain
from lacre_fabric.keys.secret_files import read_ed25519, write_secret
from lacre_fabric.operate import behind
from lacre_fabric.operate.behind import LastSigned
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site

_ANSWER: Final = 10.0  # seconds for a gateway's answer
_NOT_OURS: Final = "the fabric has no manifest that this folder's root leads to: there is nothing to catch up with"
_TWO_WAYS: Final = (
    "a process remembers a statement of a root that had handed over by then, so no chain holds both. Remove the memory of that "
    "process, and restart it"
)
# Where `lacre up` has processes keep what they remember.
_MEMORIES: Final = ("gateway/manifests", "gateway/manifests/*", "workers/*/manifests*")

Chained = tuple[Entry, ...]


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


def memories(folder: Path) -> list[Path]:
    """The memories of manifests in a state folder."""
    return sorted({path.parent for pattern in _MEMORIES for path in folder.glob(f"{pattern}/seen.json")})


def remembered(memory: Path, root: bytes) -> list[bytes]:
    """The documents in a process's memory that `root` leads to. Raises SettingsError if there is none."""
    documents = [one.document for one in VersionFile(memory).seen() if behind.of_document(one.document, root) is not None]
    if not documents:
        raise SettingsError(
            f"{memory} remembers no manifest of this folder's root: name the folder `memory` of a worker, a gateway or an "
            "application, with its file seen.json"
        )
    return documents


def catch_up(site: Site, published: bytes | None, now: float, seen: Sequence[bytes] = ()) -> CaughtUp:
    """Call it inside `site.changing`. published: of the fabric or a gateway. seen: what single processes remember besides.

    now: seconds since the epoch. Raises SettingsError.
    """
    before = site.authority.chain()
    documents = [each for each in (published, *seen) if each is not None]
    known = [(each, one) for each in documents if (one := behind.of_document(each, before.roots[0])) is not None]
    if not known:
        raise SettingsError(_NOT_OURS)
    if any(one.replaced for _, one in known):
        raise SettingsError(f"{behind.REPLACED}: only the newest copy of the folder has the new root")
    standing = [each for each in known if not any(_supersedes(one, each[1]) for _, one in known)]
    entries, steps = _joined(before, known[0][1].chain, [one for _, one in standing])
    chain = before
    if entries != before.entries:
        roots = tuple(dict.fromkeys((before.roots[0], *(step.root for step in steps))))
        chain = Chain(roots, steps[-1].statement.signer, steps[-1].statement.expires_at, entries)
        site.authority.adopt(chain)
    manifests = [_manifest(each, one, before.roots[0]) for each, one in standing]
    todo = [line for line in (_missing_key(site, name, key) for name, key in _named(chain)) if line]
    for pool in site.pools:
        todo += _reserve(site, pool, manifests, now)
    todo += [
        f"add pool {name} to site.json, or accept that the next manifest lacks it"
        for name in sorted({name for manifest in manifests for name in manifest.pools} - site.pools.keys())
    ]
    last, signed = max(standing, key=lambda one: one[1].version)
    write_secret(site.folder / "trust" / "manifest.json", last)
    newest_version = max(known[0][1].version, signed.version)
    spent = last != known[0][0] and signed.version == known[0][1].version  # two manifests have this number
    version = max(newest_version + spent, _version(site, chain))
    write_secret(site.folder / "trust" / "version", str(version).encode())
    return CaughtUp(newest_version, max(0, len(chain.entries) - len(before.entries)), tuple(todo))


def _joined(before: Chain, published: Chained, standing: Sequence[LastSigned]) -> tuple[Chained, tuple[Step, ...]]:
    """One chain that begins as the published one, and has every statement of the others. Raises SettingsError."""
    entries = before.entries if before.entries[: len(published)] == published else published
    for one in sorted(standing, key=lambda one: len(one.chain)):
        entries += tuple(entry for entry in one.chain if entry not in entries)
    try:
        return entries, follow(entries, before.roots[0])
    except UntrustedRoot:
        raise SettingsError(_TWO_WAYS) from None


def _supersedes(one: LastSigned, other: LastSigned) -> bool:
    """Whether `one` has all statements of the other, in this order, and more."""
    return len(one.chain) > len(other.chain) and one.chain[: len(other.chain)] == other.chain


def _manifest(document: bytes, signed: LastSigned, root: bytes) -> Manifest:
    return behind.manifest_in(Document.parse(document), follow(signed.chain, root)[-1].statement.signer)


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


def _reserve(site: Site, pool: str, manifests: Iterable[Manifest], now: float) -> list[str]:
    """Keeps the ids of listed keys that are not here from being used again while clients may know them."""
    generations = site.generations(pool)
    own = {fingerprint(config) for one in generations.live for config in one.configs}
    listed = [key.config for manifest in manifests if pool in manifest.pools for key in manifest.pools[pool].keys]
    lost = list(dict.fromkeys(config.key_id for config in listed if fingerprint(config) not in own))
    if not lost:
        return []
    spent = {**generations.spent, **dict.fromkeys(lost, now + MANIFEST_LIFETIME + MAX_FUTURE)}
    site.keep_generations(pool, replace(generations, spent=spent))
    ids = ", ".join(map(str, lost))
    return [
        f"pool {pool}: keys {ids} are not in this folder. Put `pools/{pool}` back, or run `lacre keys rotate --pool {pool}`"
    ]
