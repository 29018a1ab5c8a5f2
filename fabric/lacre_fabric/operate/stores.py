"""The fabric's stores that must survive: revocations and budgets. Makes them, notices that NATS lost them, and settles that.

Rules:
- A store is lost if it is gone and this site has published before. Made again and empty, it would revive revoked tokens and
  spent budgets. So the provisioner marks the loss, and gateways refuse every request while the mark stands.
- The mark is in the bucket of revocations, which every gateway reads before it serves. It stands before a lost bucket of
  budgets is made again.
- Entries of a backup come back by themselves, at the next provisioning. They settle nothing: later revocations and
  charges are still lost. Only an operator settles it (`lacre state settle`).
- What is pending is a file of the state folder, so it can be decided while NATS does not run. Every step can be repeated.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nats.js.errors
from nats.js.api import Header

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime.json_objects import parse_object
from lacre_fabric.keys.secret_files import read_secret, write_secret
from lacre_fabric.nats import streams as layout
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection, Stored
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.operate.site import Site
from lacre_fabric.work.revocations import Revocation, StoreMark

BUDGETS_STREAM: Final = f"KV_{subjects.BUDGETS_BUCKET}"
# Their names in marks and messages. A queue lives for seconds and a claim for 15 minutes: neither outlives a restore.
KEPT: Final = {subjects.REVOCATIONS_STREAM: "revocations", BUDGETS_STREAM: "budgets"}
_REMEDY: Final = "run `lacre state backup` again, or restore another file"


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One message of a store. time: when NATS took it, in seconds since the epoch."""

    subject: str
    value: bytes
    time: float

    def members(self) -> dict[str, Any]:
        return {"subject": self.subject, "value": b64u(self.value), "time": self.time}


def pending_file(folder: Path) -> Path:
    """Entries of a backup that are to come back."""
    return folder / "fabric-restore.json"


def settling_file(folder: Path) -> Path:
    """A decision to accept a loss."""
    return folder / "settle.json"


async def provision_site(site: Site, connection: Connection) -> StoreMark:
    """Provisions the site's fabric, marks lost stores, brings pending entries back, and applies a pending decision.

    Returns the mark that stands now. Safe to repeat. Raises SettingsError or FabricUnavailable.
    """
    mark = await _marked(site, connection)
    await provision(connection, site.pools, replicas=site.replicas, regions=site.regions)
    await _bring_back(connection, site.folder)
    return await _settle(connection, site.folder, mark)


async def _marked(site: Site, connection: Connection) -> StoreMark:
    """The mark that stands, with stores that are lost now. A crash between two steps forgets no loss."""
    mark, noted = await read_mark(connection), site.folder / "lost.json"
    missing = await _missing(connection)
    lost = {*(missing if site.published_at else ()), *(_noted(noted) if noted.exists() else ())}
    if not lost:
        return mark
    write_secret(noted, json.dumps({"lost": sorted(lost)}).encode())
    mark = StoreMark(tuple(sorted({*mark.lost, *lost})), mark.tokens_from)
    if "revocations" in missing:  # only the mark comes between an empty store and the gateways that read it
        wanted = layout.streams(tuple(site.pools), site.replicas, site.regions)
        async with connection.mapped():
            await connection.jetstream.add_stream(next(one for one in wanted if one.name == subjects.REVOCATIONS_STREAM))
    await _write_mark(connection, mark)
    noted.unlink()
    return mark


def _noted(path: Path) -> tuple[str, ...]:
    """A damaged note counts as the loss of everything."""
    try:
        return Members.parse(read_secret(path), "it").texts("lost")
    except InvalidMessage:
        return tuple(KEPT.values())


async def _missing(connection: Connection) -> tuple[str, ...]:
    gone = []
    async with connection.mapped():
        for stream, name in KEPT.items():
            try:
                await connection.jetstream.stream_info(stream)
            except nats.js.errors.NotFoundError:
                gone.append(name)
    return tuple(gone)


async def read_mark(connection: Connection) -> StoreMark:
    """Raises FabricUnavailable."""
    async with connection.mapped():
        try:
            stored = await connection.stored(subjects.REVOCATIONS_STREAM, {"last_by_subj": subjects.store_mark()})
        except nats.js.errors.NotFoundError:
            return StoreMark()
    try:
        return StoreMark.parse(stored.value)
    except InvalidMessage:
        return StoreMark(("unknown",))


async def _write_mark(connection: Connection, mark: StoreMark) -> None:
    async with connection.mapped():
        await connection.jetstream.publish(subjects.store_mark(), mark.encode())


async def _settle(connection: Connection, folder: Path, mark: StoreMark) -> StoreMark:
    path = settling_file(folder)
    if path.exists():
        try:
            decided = Members.parse(read_secret(path), "it").time("tokens_from")
        except InvalidMessage as exc:
            raise SettingsError(f"{path} is damaged: remove it, and run `lacre state settle` again") from exc
        mark = StoreMark((), max(mark.tokens_from, decided))
        await _write_mark(connection, mark)
        path.unlink()
    return mark


def unsettled(mark: StoreMark, folder: Path) -> str:
    """Why gateways refuse, and what to do."""
    state = shlex.quote(str(folder))
    return (
        f"NATS lost {' and '.join(mark.lost)}, so gateways refuse every request. A backup's entries are back; "
        f"accept the rest of the loss with `lacre state settle --state {state}`"
    )


def decide(folder: Path, tokens_from: float) -> None:
    """Accepts the loss, at the next provisioning. tokens_from: as in `StoreMark`."""
    write_secret(settling_file(folder), json.dumps({"tokens_from": tokens_from}).encode())


async def entries(connection: Connection) -> list[StoredEntry]:
    """Everything in the stores. Raises FabricUnavailable."""
    found = []
    async with connection.mapped():
        for stream in KEPT:
            found += [
                StoredEntry(one.subject, one.value, one.time)
                async for one in _walk(connection, stream)
                if one.subject != subjects.store_mark()
            ]
    return found


async def _walk(connection: Connection, stream: str) -> AsyncIterator[Stored]:
    sequence = 0
    while True:
        try:
            stored = await connection.stored(stream, {"seq": sequence + 1, "next_by_subj": ">"})
        except nats.js.errors.NotFoundError:
            return
        yield stored
        sequence = stored.sequence


def keep_pending(folder: Path, found: list[StoredEntry]) -> None:
    write_secret(pending_file(folder), json.dumps({"entries": [one.members() for one in found]}).encode())


def parse_entries(data: bytes | bytearray) -> list[StoredEntry]:
    """Raises InvalidMessage. Only subjects of the stores are accepted: the provisioner may write any."""
    found = []
    for each in Members(parse_object(data, "the entries"), "the entries").objects("entries"):
        entry = StoredEntry(each.text("subject"), b64u_decode(each.text("value")), each.time("time"))
        if not entry.subject.startswith(tuple(f"$KV.{name}." for name in KEPT.values())):
            raise InvalidMessage("an entry of the backup is of no store")
        found.append(entry)
    return found


async def _bring_back(connection: Connection, folder: Path) -> None:
    """Adds pending entries that are not there. An entry of NATS is newer than the backup's, so it stays."""
    path = pending_file(folder)
    if not path.exists():
        return
    try:
        pending = parse_entries(read_secret(path))
    except InvalidMessage as exc:
        raise SettingsError(f"{path} is damaged ({exc}): {_REMEDY}") from exc
    there = await entries(connection)
    known, written = {(one.subject, one.value) for one in there}, {one.subject for one in there}
    async with connection.mapped():
        for entry in pending:
            revoked = entry.subject.startswith("$KV.revocations.")
            if (entry.subject, entry.value) in known or (not revoked and entry.subject in written):
                continue
            headers = _time_to_live(entry) if revoked else {}
            if headers is not None:
                await connection.jetstream.publish(entry.subject, entry.value, headers=headers or None)
    path.unlink()


def _time_to_live(entry: StoredEntry) -> dict[str, str] | None:
    """None if the revocation is over, or invalid."""
    try:
        lives = int(Revocation.parse(entry.value, entry.subject.rpartition(".")[2]).until - time.time()) + 1
    except InvalidMessage:
        return None
    return {Header.MSG_TTL.value: str(lives)} if lives > 0 else None
