"""The requests of the audit log as an SQLite table, so that a page finds them.

It can be made again from the log at any time, and proves nothing by itself.

Rules:
- It takes entries in the order of the log, each once: the place up to which it did is in the same transaction.
- It keeps the newest requests up to a number, and a sum for each tenant, day, model and user.
- A damaged file is made again, also if a search meets the damage.
- A log that cannot be read leaves the index as it is, and says so.
- A full file drops its oldest requests.
- It reads in portions with pauses, because requests are served beside it.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre.errors import LacreError, SettingsError
from lacre_fabric.logs import Log
from lacre_gateway.audit import feed
from lacre_gateway.audit.entries import AdminIntent, Annex, Intent, Outcome, parse
from lacre_gateway.audit.feed import Cursor, PlacedEntry
from lacre_gateway.console import sqlite_file

KEEP: Final = 500_000  # requests; some 200 MB
MAX_PAGES: Final = 131_072  # of 4 KiB: 512 MiB
KEEP_DAYS: Final = 400  # of the sums
_PORTION: Final = 500  # entries of one transaction
_PAUSE: Final = 0.02  # seconds after each, for the threads that serve
PAGE: Final = 50  # requests of one answer

_FIELDS: Final = (
    "kind", "log", "idx", "time", "subject", "tenant", "issuer", "address", "pool", "model", "action", "shape", "kem", "plan",
    "max_tokens", "sealed_bytes", "decision", "policies", "policy_set", "target",
)  # fmt: skip
_ENDS: Final = (
    "outcome", "status", "problem", "exceeded", "prompt_tokens", "cached_tokens", "completion_tokens", "duration", "money",
    "unreceipted",
)  # fmt: skip
COLUMNS: Final = ("request_id", *_FIELDS, *_ENDS)
_TABLES: Final = f"""
CREATE TABLE IF NOT EXISTS requests (seq INTEGER PRIMARY KEY, request_id TEXT UNIQUE, {", ".join((*_FIELDS, *_ENDS))});
CREATE INDEX IF NOT EXISTS by_time ON requests (time);
CREATE INDEX IF NOT EXISTS by_subject ON requests (subject, seq);
CREATE INDEX IF NOT EXISTS by_tenant ON requests (tenant, seq);
CREATE INDEX IF NOT EXISTS by_outcome ON requests (outcome, seq);
CREATE INDEX IF NOT EXISTS by_subject_outcome ON requests (subject, outcome, seq);
CREATE INDEX IF NOT EXISTS by_tenant_outcome ON requests (tenant, outcome, seq);
CREATE INDEX IF NOT EXISTS by_under_way ON requests (seq) WHERE outcome IS NULL AND kind = 'intent';
CREATE TABLE IF NOT EXISTS sums (tenant TEXT, day INTEGER, model TEXT, subject TEXT, requests INTEGER, prompt INTEGER,
    cached INTEGER, completion INTEGER, money INTEGER, PRIMARY KEY (tenant, day, model, subject)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS place (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), log TEXT, idx INTEGER);
"""
# Only names from this file are in the texts of statements; values are bound.
_ADD: Final = (
    f"INSERT OR IGNORE INTO requests ({', '.join(('request_id', *_FIELDS))}) VALUES ({', '.join('?' * (len(_FIELDS) + 1))})"  # noqa: S608
)
_END: Final = f"UPDATE requests SET {', '.join(f'{name} = ?' for name in _ENDS)} WHERE request_id = ?"  # noqa: S608
_SUM: Final = """INSERT INTO sums SELECT tenant, CAST(time / 86400 AS INTEGER), model, subject, 1, ?, ?, ?, ? FROM requests
WHERE request_id = ? ON CONFLICT DO UPDATE SET requests = requests + 1, prompt = prompt + excluded.prompt,
cached = cached + excluded.cached, completion = completion + excluded.completion, money = money + excluded.money"""
_PLACE: Final = "SELECT log, idx FROM place"
_CUT: Final = "DELETE FROM requests WHERE seq <= (SELECT min(seq) + (max(seq) - min(seq)) / 10 FROM requests)"  # a tenth
# Each step finds the next one in the index: a DISTINCT would read all of it.
_OUTCOMES: Final = """WITH RECURSIVE found (name) AS (SELECT min(outcome) FROM requests UNION ALL
SELECT (SELECT min(outcome) FROM requests WHERE outcome > name) FROM found WHERE name IS NOT NULL)
SELECT name FROM found WHERE name IS NOT NULL"""
UNDER_WAY: Final = "under way"
_DAMAGED: Final = "the index is damaged and made again"


@dataclass(frozen=True, slots=True)
class Found:
    """A request of the index: its members by name, and its number."""

    seq: int
    members: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UseSum:
    """What a user did in a day with a model. day: since the epoch."""

    day: int
    model: str
    subject: str
    requests: int
    prompt: int
    cached: int
    completion: int
    money: int


@dataclass(frozen=True, slots=True)
class WantedRequests:
    """Which requests. before: the number of one; only older ones are wanted. Times in seconds since the epoch."""

    request_id: str | None = None
    subject: str | None = None
    tenant: str | None = None
    outcome: str | None = None
    since: float | None = None
    until: float | None = None
    before: int | None = None


class RequestIndex:
    """Used in any thread. path: of the file. root: of the audit logs. keep: how many requests stay."""

    def __init__(self, path: Path, root: Path, log: Log, keep: int = KEEP) -> None:
        self._path = path
        self._root = root
        self._log = log
        self._keep = keep
        self._catching_up = threading.Lock()
        self._lock = threading.Lock()
        self._database = self._opened()
        self._damage = ""  # what a search met; the file is made again before the next entries
        self.fault = ""  # why the log could not be read, the last time

    def catch_up(self, patience: float = 60.0) -> None:
        """Takes the entries that came since. Never raises for a log or a file that does not hold: `fault` says it.

        patience: seconds to wait for another thread that does so; after them, nothing is done.
        """
        if not self._catching_up.acquire(timeout=patience):
            return
        try:
            try:
                if self._damage:
                    self._make_again()
                self._catch_up()
                self.fault = ""
            except (LacreError, OSError) as exc:
                self._tell(str(exc))
            except sqlite3.DatabaseError as exc:
                self._tell(f"{_DAMAGED} ({exc})")
                self._make_again()
        finally:
            self._catching_up.release()

    @property
    def place(self) -> Cursor | None:
        """The next entry that it takes; None if it has none yet, or the file is damaged."""
        row = next(iter(self._rows(_PLACE, ())), None)
        return None if row is None else Cursor(*row)

    def find(self, wanted: WantedRequests, limit: int = PAGE) -> list[Found]:
        """The newest first; none if the file is damaged: `fault` says so."""
        index, terms, values = _chosen(wanted)
        if wanted.since is not None:
            terms.append(
                "seq >= (SELECT ifnull((SELECT seq FROM requests WHERE time >= ? ORDER BY time, seq LIMIT 1), 1 << 62))"
            )
            values.append(wanted.since)
        if wanted.until is not None:
            terms.append("seq < ifnull((SELECT seq FROM requests WHERE time >= ? ORDER BY time, seq LIMIT 1), 1 << 62)")
            values.append(wanted.until)
        if wanted.before is not None:
            terms.append("seq < ?")
            values.append(wanted.before)
        where = f"WHERE {' AND '.join(terms)}" if terms else ""
        query = f"SELECT seq, {', '.join(COLUMNS)} FROM requests {index} {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608
        return [Found(row[0], _members(row[1:])) for row in self._rows(query, (*values, limit))]

    def sums(self, tenant: str, since_day: int) -> list[UseSum]:
        """A tenant's use, the newest day first."""
        query = (
            "SELECT day, model, subject, requests, prompt, cached, completion, money FROM sums "
            "WHERE tenant = ? AND day >= ? ORDER BY day DESC, requests DESC, model, subject"
        )
        return [UseSum(*row) for row in self._rows(query, (tenant, since_day))]

    @property
    def outcomes(self) -> list[str]:
        """Those that requests of the index have."""
        return [name for (name,) in self._rows(_OUTCOMES, ())]

    def close(self) -> None:
        with self._catching_up, self._lock:
            self._database.close()

    def _rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            try:
                return self._database.execute(query, values).fetchall()
            except sqlite3.DatabaseError as exc:
                self._damage = str(exc)
        self._tell(f"{_DAMAGED} ({self._damage})")
        return []

    def _make_again(self) -> None:
        with self._lock:
            self._database.close()
            self._path.unlink(missing_ok=True)
            self._database = self._opened()
            self._damage = ""

    def _catch_up(self) -> None:
        """Raises LacreError, OSError or sqlite3.DatabaseError."""
        with self._lock:
            row = self._database.execute(_PLACE).fetchone()
        try:
            self._take(feed.read(self._root, None, None if row is None else Cursor(*row), alone=True))
        except SettingsError:
            if row is None:
                raise
            self._forget()  # the log of that place was erased, or is another one
            self._take(feed.read(self._root, None, None, alone=True))

    def _take(self, entries: Iterator[PlacedEntry | None]) -> None:
        portion: list[PlacedEntry] = []
        for entry in entries:
            if entry is None:
                break
            portion.append(entry)
            if len(portion) >= _PORTION and b'"annex"' not in entry.data[:40]:
                self._write(portion)
                portion = []
                time.sleep(_PAUSE)
        if portion:
            self._write(portion)

    def _write(self, portion: Sequence[PlacedEntry]) -> None:
        try:
            self._add(portion)
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            with self._lock, self._database as database:
                database.execute(_CUT)
            self._add(portion)

    def _add(self, portion: Sequence[PlacedEntry]) -> None:
        with self._lock, self._database as database:
            policies: list[str] | None = None
            for entry in portion:
                members = parse(entry.data)
                policies = _take_entry(database, entry, members, policies)
            last = portion[-1]
            database.execute("INSERT OR REPLACE INTO place VALUES (1, ?, ?)", (last.origin, last.index + 1))
            database.execute("DELETE FROM requests WHERE seq <= (SELECT max(seq) FROM requests) - ?", (self._keep,))
            database.execute("DELETE FROM sums WHERE day < ?", (int(time.time() // 86400) - KEEP_DAYS,))

    def _forget(self) -> None:
        with self._lock, self._database as database:
            for table in ("requests", "sums", "place"):
                database.execute(f"DELETE FROM {table}")  # noqa: S608

    def _tell(self, fault: str) -> None:
        if fault != self.fault:
            self._log.warning("requests not indexed", reason=fault)
        self.fault = fault

    def _opened(self) -> sqlite3.Connection:
        return sqlite_file.opened(self._path, _prepare, self._set_aside, self._log, "requests indexed in memory")

    def _set_aside(self, _damage: sqlite3.DatabaseError) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _prepare(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError."""
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = OFF")  # a crash may damage it: then it is made again
    database.execute(f"PRAGMA max_page_count = {MAX_PAGES}")
    database.executescript(_TABLES)
    database.execute(f"SELECT {', '.join(COLUMNS)} FROM requests LIMIT 1").fetchone()  # noqa: S608


def _chosen(wanted: WantedRequests) -> tuple[str, list[str], list[Any]]:
    """The index to use, the terms of a WHERE, and their values.

    SQLite knows no counts, so it could take the index of an outcome that nearly all requests have. It would then read each row.
    """
    named = [(name, getattr(wanted, name)) for name in ("request_id", "subject", "tenant")]
    given = [(name, value) for name, value in named if value is not None]
    terms, values = [f"{name} = ?" for name, _ in given], [value for _, value in given]
    first = given[0][0] if given else ""
    index = f"by_{first}" if first else ""
    if wanted.outcome == UNDER_WAY:
        index, terms = "by_under_way", [*terms, "outcome IS NULL", "kind = 'intent'"]
    elif wanted.outcome is not None:
        index, terms, values = f"{index or 'by'}_outcome", [*terms, "outcome = ?"], [*values, wanted.outcome]
    # There is one request of an id.
    return f"INDEXED BY {index}" if index and first != "request_id" else "", terms, values


def _take_entry(
    database: sqlite3.Connection, entry: PlacedEntry, members: Mapping[str, Any], policies: list[str] | None
) -> list[str] | None:
    """policies: of the annex before. Returns those of this annex, for the next entry."""
    kind = members["kind"]
    if kind == Annex.kind:
        return list(members["policies"])
    if kind in (Intent.kind, AdminIntent.kind):
        named = policies if policies is not None and members.get("annex") is not None else members["policies"]
        row = {**members, "log": entry.origin, "idx": entry.index, "policies": json.dumps(named)}
        database.execute(_ADD, (members["request_id"], *(row.get(name) for name in _FIELDS)))
    elif kind == Outcome.kind:
        done = database.execute(_END, (*(members.get(name) for name in _ENDS), members["request_id"])).rowcount
        if done and members["outcome"] != "refused":
            counts = (members["prompt_tokens"], members["cached_tokens"], members["completion_tokens"], members.get("money"))
            database.execute(_SUM, (*(count or 0 for count in counts), members["request_id"]))
    return None


def _members(row: Sequence[Any]) -> dict[str, Any]:
    members = dict(zip(COLUMNS, row, strict=True))
    members["policies"] = json.loads(members["policies"] or "[]")
    return members
