"""Compares three things that must agree: the state folder, the manifest on the fabric, and what processes remember of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lacre.errors import SettingsError
from lacre.trust.manifest_store import VersionFile
from lacre_fabric.operate import behind, catching_up, stores
from lacre_fabric.operate.behind import LastSigned
from lacre_fabric.operate.fabric_check import FabricFinding, Severity
from lacre_fabric.operate.site import Site
from lacre_fabric.work.revocations import StoreMark

_PUBLISH: Final = "run `lacre manifest publish`"
_NEWER: Final = f"find the newest state folder, or run `lacre state catch-up`; then {_PUBLISH}"
_FIRST: Final = f"if the folder is from a backup, run `lacre state catch-up` first; then {_PUBLISH}"


def compare(site: Site, published: bytes | None) -> list[FabricFinding]:
    """published: the manifest document on the fabric."""
    try:
        chain = site.authority.chain()
        fabric = None if published is None else behind.of_document(published, chain.roots[0])
        found = [_state(site, published, fabric, chain.entries)]
    except SettingsError as exc:
        return [FabricFinding("state", Severity.WRONG, str(exc), "restore the folder: docs/rotation.md, After a restore")]
    return [*found, *_memories(site, fabric, frozenset(chain.roots))]


def compare_stores(site: Site, mark: StoreMark) -> FabricFinding:
    """Whether NATS lost a store that nobody has settled."""
    if not mark.lost:
        return FabricFinding("stores", Severity.OK, "nothing is marked as lost")
    return FabricFinding("stores", Severity.WRONG, f"NATS lost {' and '.join(mark.lost)}", stores.unsettled(mark, site.folder))


def _state(
    site: Site, published: bytes | None, fabric: LastSigned | None, entries: tuple[tuple[str, ...], ...]
) -> FabricFinding:
    if published is None:
        return FabricFinding("state", Severity.WRONG, "the fabric has no manifest", _FIRST)
    older = behind.why(site, published)
    if older is not None:
        return FabricFinding("state", Severity.WRONG, older, behind.remedy(site.folder, older))
    if fabric is None:
        return FabricFinding("state", Severity.WRONG, "the fabric's manifest is damaged", _PUBLISH)
    own = behind.of_state(site.folder, entries).version
    if own == fabric.version:
        return FabricFinding("state", Severity.OK, f"version {own}, as the fabric has it")
    return FabricFinding("state", Severity.WEAK, f"version {own} was signed, the fabric has {fabric.version}", _PUBLISH)


def _memories(site: Site, fabric: LastSigned | None, roots: frozenset[bytes]) -> Iterator[FabricFinding]:
    for folder in catching_up.memories(site.folder):
        check = f"memory {folder.relative_to(site.folder)}"
        try:
            seen = [one.version for one in VersionFile(folder).seen() if not roots.isdisjoint(one.roots)]
        except SettingsError as exc:
            yield FabricFinding(check, Severity.WRONG, str(exc), "remove the file if you know why it is damaged")
            continue
        if fabric is not None and seen and max(seen) > fabric.version:
            told = f"it has seen version {max(seen)}, and ignores version {fabric.version} of the fabric"
            yield FabricFinding(check, Severity.WRONG, told, _NEWER)
        elif seen:
            yield FabricFinding(check, Severity.OK, f"version {max(seen)}")
