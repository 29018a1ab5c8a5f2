"""The entries of a log as an SQLite table, for searches. It can be rebuilt from the log at any time; it proves nothing by
itself.

One row for each entry: its log's origin, its index, its plain members, and the whole entry as JSON.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError
from lacre.runtime.json_text import shown
from lacre_gateway.audit.entries import parse
from lacre_gateway.audit.feed import PlacedEntry

COLUMNS: Final = (
    "kind", "request_id", "time", "subject", "tenant", "issuer", "address", "pool", "model", "action", "shape", "kem", "plan",
    "max_tokens", "sealed_bytes", "enc", "decision", "outcome", "status", "unreceipted", "prompt_tokens", "cached_tokens",
    "completion_tokens", "duration", "money", "problem", "exceeded", "event", "actor", "target", "gateway", "policy_set",
    "rules", "reason",
)  # fmt: skip
# Only names from this file are in the text; values are bound.
_TABLE: Final = f"CREATE TABLE entries (log TEXT, idx INTEGER, {', '.join(COLUMNS)}, entry TEXT NOT NULL)"
_INSERT: Final = f"INSERT INTO entries VALUES ({', '.join('?' * (len(COLUMNS) + 3))})"  # noqa: S608


def build(entries: Iterable[PlacedEntry], path: Path | None = None) -> sqlite3.Connection:
    """The table of these entries, the oldest first.

    path: a new file (0600) that replaces the old one; None: in memory.
    """
    if path is not None:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
    database = sqlite3.connect(path or ":memory:")
    database.execute(_TABLE)
    with database:
        database.executemany(_INSERT, _rows(entries))
        database.execute("CREATE INDEX by_request ON entries (request_id)")
        database.execute("CREATE INDEX by_subject ON entries (subject, time)")
    return database


def find(
    database: sqlite3.Connection, wanted: Mapping[str, Any], since: float | None, until: float | None, limit: int
) -> list[str]:
    """The newest `limit` entries with the wanted members, the oldest first, as JSON. Times are seconds since the epoch."""
    terms = [f"{name} = ?" for name in wanted]
    values = list(wanted.values())
    for term, value in (("time >= ?", since), ("time < ?", until)):
        if value is not None:
            terms.append(term)
            values.append(value)
    where = f"WHERE {' AND '.join(terms)}" if terms else ""
    rows = database.execute(f"SELECT entry FROM entries {where} ORDER BY rowid DESC LIMIT ?", (*values, limit))  # noqa: S608
    return [entry for (entry,) in rows.fetchall()[::-1]]


def ask(database: sqlite3.Connection, sql: str) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """The names and rows of any reading statement. Raises SettingsError with SQLite's message."""
    database.execute("PRAGMA query_only = ON")
    try:
        with closing(database.execute(sql)) as cursor:
            return [column[0] for column in cursor.description or ()], cursor.fetchall()
    except sqlite3.Error as exc:
        raise SettingsError(f"--sql: {exc}; the table is entries (log, idx, {', '.join(COLUMNS)}, entry)") from exc


def _rows(entries: Iterable[PlacedEntry]) -> Iterator[Sequence[Any]]:
    for entry in entries:
        members = parse(entry.data)
        line = shown({"index": entry.index, **members})
        yield (entry.origin, entry.index, *(members.get(name) for name in COLUMNS), line)
