"""`lacre audit`: verify a log, prove an entry, check a client's proof, and search. Nothing here needs a gateway."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from lacre.cli.output import at_terminal, counting, say, say_json, waiting
from lacre.cli.surroundings import read_file
from lacre.errors import InvalidMessage, SettingsError

if TYPE_CHECKING:
    from lacre.evidence.audit_proof import AuditProof
    from lacre_gateway.audit.reader import LogReader

_Entry = TypeVar("_Entry")
audit_app = typer.Typer(name="audit", help="The audit log: verify it, prove from it, search it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of the log.")]
KeyOption = Annotated[
    str | None,
    typer.Option(help="The gateway's key, base64url (`gateway_key` in the manifest); default: the log's own."),
]
# What this version writes. A newer one may have added some, so they matter to a search that finds nothing.
_VALUES: Final = {
    "kind": ("intent", "annex", "outcome", "admin", "event", "link"),
    "decision": ("allow", "deny"),
    "outcome": ("answered", "refused", "client-gone", "broken", "interrupted"),
}
_FLUSHED_AFTER: Final = 4096  # entries: an export that is cut off repeats at most so many with its cursor


class NoProofFile(InvalidMessage):
    """A file that was named as an audit proof holds something else."""

    remedy = "Name the output of `lacre audit prove`, a client's `reply.audit.text()`, or the value of a header Lacre-Audit."


def register(app: typer.Typer) -> None:
    app.add_typer(audit_app)


@audit_app.command("verify")
def audit_verify(
    folder: Folder,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="A checkpoint that was kept outside the log; may be repeated.")
    ] = None,
    key: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify every byte of a log, and name the first fault. Exit code 1 if there is one."""
    from lacre_gateway.audit.check import verify

    with waiting("verifying every byte"):
        verdict = verify(folder, parse_key(key), [read_file(path) for path in checkpoint or ()])
    found = {
        "ok": verdict.wrong is None, "verdict": verdict.words, "origin": verdict.origin, "entries": verdict.size,
        "root": verdict.root.hex(), "requests": verdict.requests, "under_way": verdict.under_way, "torn": verdict.torn,
        "logs": verdict.logs, "erased": verdict.erased, "uncompared": verdict.uncompared, "continues": verdict.continues,
        "place": None if verdict.wrong is None else verdict.wrong.place,
    }  # fmt: skip
    if as_json:
        say_json(found)
    else:
        say(f"{verdict.origin or folder}: {verdict.size} entries, {verdict.requests} requests")
        if verdict.logs > 1:
            say(f"{verdict.logs} linked logs, of which retention erased {verdict.erased}; the line above is of the newest")
        if verdict.uncompared:
            say(f"{verdict.uncompared} kept checkpoints are of erased logs, and cannot be compared any more")
        if verdict.under_way:
            say(f"{verdict.under_way} requests are running, or were cut off by a crash: the next start records their outcome")
        if verdict.torn:
            say(f"{verdict.torn} bytes of an unfinished commit, on which no answer depended")
        say(verdict.words)
    if verdict.wrong is not None:
        raise typer.Exit(1)


@audit_app.command("prove")
def audit_prove(
    folder: Folder,
    index: Annotated[int | None, typer.Option(help="The entry's index.")] = None,
    request: Annotated[str | None, typer.Option(help="Or the id of the request whose intent to prove.")] = None,
    origin: Annotated[str | None, typer.Option(help="Of which of several linked logs; default: the newest.")] = None,
    key: KeyOption = None,
) -> None:
    """Print an entry's proof under the newest checkpoint (C2SP tlog-proof)."""
    from lacre_gateway.audit import chain

    if (index is None) is (request is None):
        raise SettingsError("pass either --index or --request")
    readers = chain.readers(folder, parse_key(key))[::-1]
    if origin is not None:
        readers = [reader for reader in readers if reader.checkpoint.origin == origin]
        if not readers:
            raise SettingsError(f"there is no log {origin} in {folder}, or it was erased")
    for reader in readers:
        with waiting("looking for the entry"):
            found = index if index is not None else _intent_of(reader, str(request))
            proof = None if found is None else reader.proof(found).text()
        if proof is not None:
            typer.echo(proof, nl=False)
            return
    raise SettingsError(f"the log has no request {request}")


def _intent_of(reader: LogReader, request: str) -> int | None:
    from lacre_gateway.audit.entries import parse

    members = map(parse, reader.entries())
    named = (place for place, entry in enumerate(members) if (entry["kind"], entry.get("request_id")) == ("intent", request))
    return next(named, None)


@audit_app.command("check-receipt")
def audit_check_receipt(
    proof: Annotated[Path, typer.Argument(help="The client's proof: `reply.audit.text()`, or the value of Lacre-Audit.")],
    folder: Folder,
    key: KeyOption = None,
) -> None:
    """Check a client's proof against the log: the entry is still there, and the log extends the proven tree."""
    from lacre.evidence import checkpoints
    from lacre_gateway.audit import chain, feed
    from lacre_gateway.audit.check import check_receipt

    kept, public = _proof(proof), parse_key(key)
    origin = checkpoints.parse(kept.checkpoint).origin
    if any(part.erased and part.checkpoint.origin == origin for part in chain.parts(folder, public)):
        read = feed.entries(folder, public)
        for _ in counted("looking for the record of the erasure", read, [folder], public):  # or nobody has recorded it
            pass
        raise SettingsError(f"retention erased the log {origin}: `lacre audit check-proof` still checks the proof itself")
    readers = chain.readers(folder, public)
    own = [reader for reader in readers if reader.checkpoint.origin == origin]
    with waiting("comparing the log with the proof"):
        check_receipt(kept, (own or readers)[-1])
    typer.echo(f"entry {kept.index} is in the log, and the log extends the proven tree")


@audit_app.command("check-proof")
def audit_check_proof(
    proof: Annotated[Path, typer.Argument(help="A proof: from `lacre audit prove` or a client, or the value of Lacre-Audit.")],
    key: Annotated[str, typer.Option(help="The gateway's key, base64url (`gateway_key` in the manifest).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a proof without the log: the gateway of this key signed a log that holds the entry. Prints the entry."""
    public = parse_key(key)
    kept = _proof(proof)
    checkpoint = kept.verify(public or b"")
    members = kept.members
    if as_json:
        say_json({"ok": True, "log": checkpoint.origin, "entries": checkpoint.size, "index": kept.index, "entry": members})
        return
    typer.echo(f"{checkpoint.origin} holds this as entry {kept.index} of {checkpoint.size}:")
    say_json(members)


def _proof(path: Path) -> AuditProof:
    """Raises NoProofFile or MessageTooLarge."""
    from lacre.evidence.audit_proof import AuditProof

    text = read_file(path).decode("utf-8", "replace")
    try:
        return AuditProof.parse(text) if text.startswith("c2sp.org/") else AuditProof.parse_header(text.strip())
    except InvalidMessage as exc:
        raise NoProofFile(f"{path} holds no audit proof: {exc}") from exc


@audit_app.command("rotate")
def audit_rotate(folder: Folder) -> None:
    """Ask the running gateway for a new log that continues this one, and wait until it is there. No request is refused."""
    from lacre_gateway.audit import series
    from lacre_gateway.audit.reader import own_key

    own_key(folder)  # or it is no log
    with waiting("the gateway rotates the log"):
        begun = series.ask(folder)
    if not begun:
        raise SettingsError("no gateway took up the rotation yet: one that writes this log does so when it starts")
    typer.echo(f"the log continues in {series.place(folder, series.newest(folder))}")


@audit_app.command("export")
def audit_export(
    folder: Folder,
    form: Annotated[str, typer.Option("--format", help="jsonl, cef or ocsf.")] = "jsonl",
    since: Annotated[datetime | None, typer.Option(help="From this time on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Before this time, UTC.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new entries.")] = False,
    cursor: Annotated[
        Path | None, typer.Option(help="Remember the place after the last entry in this file, and go on there.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Export a log by itself, without the log that it continues.")] = False,
    key: KeyOption = None,
) -> None:
    """Print the entries of all linked logs for other systems, one a line. `lacre audit verify` tells whether the logs hold."""
    from lacre_gateway.audit import export
    from lacre_gateway.audit.feed import Cursor, PlacedEntry, read

    named = next((known for known in export.FORMATS if known == form), None)
    if named is None:
        raise SettingsError(f"--format {form}: pass jsonl, cef or ocsf")
    if cursor is not None and until is not None:
        raise SettingsError("--until with --cursor would skip later entries for good: leave one of them out")
    public, exporter = parse_key(key), export.Exporter(named, seconds(since), seconds(until))
    start = None if cursor is None else Cursor.load(cursor)
    if start is not None:
        exporter.look_back(folder, public, start)
    unsaved: list[PlacedEntry] = []

    def flush() -> None:
        sys.stdout.flush()
        if cursor is not None and unsaved:  # after the flush: a crash repeats lines, and loses none
            Cursor(unsaved[-1].origin, unsaved[-1].index + 1).save(cursor)
        unsaved.clear()

    entries = read(folder, public, start, follow=follow, alone=alone)
    # At a terminal the lines themselves are seen. An export that goes on has no end to show.
    for entry in entries if follow or start is not None or at_terminal() else counted("exporting", entries, [folder], public):
        if entry is None:
            flush()
            if follow and _reader_is_gone():
                raise BrokenPipeError
            continue
        sys.stdout.writelines(line + "\n" for line in exporter.lines(entry))
        unsaved.append(entry)
        if len(unsaved) == _FLUSHED_AFTER:
            flush()


def _reader_is_gone() -> bool:
    """Whether the reader of a pipe has closed it. Without this, a quiet log would be followed for ever."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(found & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, found in poller.poll(0))


@audit_app.command("tail")
def audit_tail(
    folder: Folder,
    lines: Annotated[int, typer.Option("-n", help="How many entries.", min=0)] = 10,
    follow: Annotated[bool, typer.Option("-f", help="Keep printing new entries.")] = False,
    key: KeyOption = None,
) -> None:
    """Print the newest entries, one a line."""
    from lacre_gateway.audit import chain
    from lacre_gateway.audit.entries import parse
    from lacre_gateway.audit.feed import Cursor, read

    public = parse_key(key)
    newest = chain.parts(folder, public)[-1].checkpoint
    start = Cursor(newest.origin, max(0, newest.size - lines))
    for entry in read(folder, public, start, follow=follow, alone=True):
        if entry is not None:
            say_json(parse(entry.data))
        elif follow and _reader_is_gone():
            raise BrokenPipeError


@audit_app.command("query")
def audit_query(
    folder: Folder,
    subject: Annotated[str | None, typer.Option(help="Who asked.")] = None,
    tenant: Annotated[str | None, typer.Option(help="For which tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model.")] = None,
    decision: Annotated[str | None, typer.Option(help="allow or deny.")] = None,
    outcome: Annotated[str | None, typer.Option(help="answered, refused, client-gone, broken or interrupted.")] = None,
    request: Annotated[str | None, typer.Option(help="A request's id.")] = None,
    kind: Annotated[str | None, typer.Option(help="intent, annex, outcome, admin, event or link.")] = None,
    since: Annotated[datetime | None, typer.Option(help="From this time on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Before this time, UTC.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many, the newest.", min=1)] = 100,
    sql: Annotated[str | None, typer.Option(help="Any SELECT over the table `entries` instead.")] = None,
    index: Annotated[Path | None, typer.Option(help="Keep the SQLite index in this file; rebuilt each time.")] = None,
    key: KeyOption = None,
) -> None:
    """Search the log and print JSON lines. The index is built from the log; `lacre audit verify` tells whether the log
    holds.
    """
    from lacre_gateway.audit import feed
    from lacre_gateway.audit import index as indexes

    public = parse_key(key)
    found = (entry for entry in feed.read(folder, public, alone=True) if entry is not None)
    database = indexes.build(counted("indexing the log", found, [folder], public), index)
    if sql is not None:
        names, rows = indexes.ask(database, sql)
        for row in rows:
            say_json(dict(zip(names, row, strict=True)))
    else:
        wanted: dict[str, Any] = {
            "subject": subject, "tenant": tenant, "model": model, "decision": decision, "outcome": outcome,
            "request_id": request, "kind": kind,
        }  # fmt: skip
        wanted = {name: value for name, value in wanted.items() if value is not None}
        entries = [*indexes.find(database, wanted, seconds(since), seconds(until), limit)]
        for entry in entries:
            say(entry)
        for name, known in _VALUES.items():
            if not entries and wanted.get(name, known[0]) not in known:
                raise SettingsError(f"no entry has the {name} {wanted[name]!r}: known are {', '.join(known)}")
    database.close()


def counted(what: str, entries: Iterable[_Entry], folders: Sequence[Path], key: bytes | None = None) -> Iterator[_Entry]:
    """The entries of these logs, and at a terminal a bar of how many there were."""
    from lacre_gateway.audit import chain

    def total() -> int:
        return sum(part.checkpoint.size for folder in folders for part in chain.parts(folder, key) if not part.erased)

    return counting(what, entries, total)


def seconds(moment: datetime | None) -> float | None:
    """Seconds since the epoch; a moment without a zone is in UTC."""
    return None if moment is None else moment.replace(tzinfo=UTC).timestamp()


def parse_key(text: str | None) -> bytes | None:
    """The key in `--key`. Raises SettingsError."""
    from lacre.jose.jws import b64u_decode

    if text is None:
        return None
    try:
        key = b64u_decode(text)
    except InvalidMessage as exc:
        raise SettingsError("--key is not base64url: `lacre manifest show --json` has it as gateway_key") from exc
    if len(key) != 32:
        raise SettingsError("--key must hold 32 bytes: `lacre manifest show --json` has it as gateway_key")
    return key
