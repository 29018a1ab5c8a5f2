"""Is the state folder behind the fabric? A restored backup is: every process that saw a newer manifest ignores its own.

Rules:
- Every change of keys and every publication asks first (`check`). A state that is behind signs nothing and changes nothing.
- The decision (`against`) takes values and does no I/O.
- Only a document that this state's first root leads to counts. Anything else in the bucket is damage, which the next
  publication replaces. The exception is a document of another root: then the address or the folder is wrong.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import nats.js.errors

from lacre.errors import LacreError, SettingsError
from lacre.jose.claims import Members
from lacre.jose.jws import verify as verify_jws
from lacre.trust.chain import Entry, chain_of, follow
from lacre.trust.manifest import MANIFEST_TYP, Document, Manifest
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate.site import Site

_COPY: Final = "put `trust/`, `pools/`, `root.pem` and `signer.pem` back from the newest copy of the folder"

OTHER_ROOT: Final = "the fabric has the manifest of another root"
REPLACED: Final = "another copy of this folder replaced the root"


class StateBehind(SettingsError):
    """The fabric has a newer manifest, or another one, than this state folder signed. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class LastSigned:
    """What a state folder or a document says of itself. chain: the root statements. version: of the newest manifest.

    token: that manifest's JWS; empty if it is not known. replaced: whether another root took the place of this one.
    """

    chain: tuple[Entry, ...]
    version: int
    token: str = ""
    replaced: bool = False


def of_state(folder: Path, chain: tuple[Entry, ...]) -> LastSigned:
    """chain: the state's statements. Raises SettingsError if the count of versions is damaged."""
    path = folder / "trust" / "version"
    try:
        version = int(path.read_text()) if path.exists() else 0
    except (OSError, ValueError) as exc:
        raise SettingsError(f"{path} is damaged: run `lacre state catch-up`, which reads the version from the fabric") from exc
    try:
        token = Document.parse((folder / "trust" / "manifest.json").read_bytes()).manifest
    except (OSError, LacreError):
        token = ""
    return LastSigned(chain, version, token)


def of_document(document: bytes, root: bytes) -> LastSigned | None:
    """None if `root` does not lead to its manifest. An expired one counts: its version was seen."""
    try:
        parsed = Document.parse(document)
        chain = chain_of(parsed, root)
        manifest = manifest_in(parsed, follow(chain, root)[-1].statement.signer)
    except LacreError:
        return None
    return LastSigned(chain, manifest.version, parsed.manifest, bool(parsed.beside) and chain == parsed.roots)


def manifest_in(document: Document, signer: bytes) -> Manifest:
    """The manifest, which may have expired. Raises InvalidSignature or InvalidMessage."""
    return Manifest.parse(Members(verify_jws(document.manifest, signer, MANIFEST_TYP), "the manifest"))


def against(state: LastSigned, fabric: LastSigned) -> str | None:
    """Why the state is behind the fabric; None if it is not."""
    if fabric.replaced and not state.replaced:
        return REPLACED
    own, there = len(state.chain), len(fabric.chain)
    if state.chain[:there] != fabric.chain:
        if fabric.chain[:own] == state.chain:
            return f"the fabric has {there} root statements, and this folder only the first {own}"
        return "another copy of this folder changed its root or signer: both have statements that the other lacks"
    if fabric.version > state.version:
        return f"the fabric has version {fabric.version} of the manifest, and this folder only {state.version}"
    if fabric.version == state.version and "" != state.token != fabric.token:
        return f"another copy of this folder signed version {fabric.version} of the manifest too"
    return None


def why(site: Site, published: bytes | None) -> str | None:
    """Why the state is behind the published document; None if it is not, or nothing is published."""
    if published is None:
        return None
    chain, before = site.authority.chain(), site.authority.before()
    fabric = of_document(published, chain.roots[0])
    if fabric is not None:
        return against(of_state(site.folder, chain.entries), fabric)
    if before is not None and (fabric := of_document(published, before.roots[0])) is not None:
        return against(replace(of_state(site.folder, before.entries), replaced=True), fabric)
    return OTHER_ROOT if _is_sound(published) else None


def _is_sound(document: bytes) -> bool:
    """Whether it could be a manifest of another root: its statements and manifest at least parse."""
    try:
        return bool(Document.parse(document).roots)
    except LacreError:
        return False


async def published(connection: Connection) -> bytes | None:
    """The manifest on the fabric, from the bucket's leader: a replica may be late. None if there is none.

    Needs the provisioner's rights. Raises FabricUnavailable.
    """
    async with connection.mapped():
        try:
            stored = await connection.stored(f"KV_{subjects.TRUST_BUCKET}", {"last_by_subj": subjects.manifest()})
        except nats.js.errors.NotFoundError:
            return None
    return stored.value or None


async def check(site: Site, connection: Connection, *, new_root: bool = False) -> bool:
    """Whether the fabric has a manifest at all. new_root: it may be of another root.

    Raises StateBehind, which says what to put back, SettingsError or FabricUnavailable.
    """
    there = await published(connection)
    found = why(site, there)
    if found is not None and not (new_root and found == OTHER_ROOT):
        raise StateBehind(f"{site.folder} is behind: {found}. {remedy(site.folder, found)}")
    return there is not None


def remedy(folder: Path, found: str) -> str:
    if found == OTHER_ROOT:
        return (
            "Check the address of the NATS servers in site.json. If the folder is to replace that root, run "
            "`lacre manifest publish --new-root`"
        )
    if found == REPLACED:
        return f"{_COPY[0].upper()}{_COPY[1:]}"
    return (
        f"Either {_COPY}, or run `lacre state catch-up --state {shlex.quote(str(folder))}`, which takes the statements and the "
        "version from the fabric"
    )
