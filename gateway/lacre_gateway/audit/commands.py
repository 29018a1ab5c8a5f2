"""`lacre audit`: verify a log, prove an entry, check a client's proof, and search. Nothing here needs a gateway."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from lacre.cli.output import say_json, waiting
from lacre.cli.surroundings import read_file
from lacre.errors import SettingsError

audit_app = typer.Typer(name="audit", help="The audit log: verify it, prove from it, search it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of the log.")]
KeyOption = Annotated[
    str | None,
    typer.Option(help="The gateway's key, base64url (`gateway_key` in the manifest); default: the log's own."),
]


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
        "place": None if verdict.wrong is None else verdict.wrong.place,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{verdict.origin or folder}: {verdict.size} entries, {verdict.requests} requests")
        if verdict.under_way:
            typer.echo(
                f"{verdict.under_way} requests are running, or were cut off by a crash: the next start records their outcome"
            )
        if verdict.torn:
            typer.echo(f"{verdict.torn} bytes of an unfinished commit, on which no answer depended")
        typer.echo(verdict.words)
    if verdict.wrong is not None:
        raise typer.Exit(1)


@audit_app.command("prove")
def audit_prove(
    folder: Folder,
    index: Annotated[int | None, typer.Option(help="The entry's index.")] = None,
    request: Annotated[str | None, typer.Option(help="Or the id of the request whose intent to prove.")] = None,
    key: KeyOption = None,
) -> None:
    """Print an entry's proof under the newest checkpoint (C2SP tlog-proof)."""
    from lacre_gateway.audit.entries import parse
    from lacre_gateway.audit.reader import LogReader

    if (index is None) is (request is None):
        raise SettingsError("pass either --index or --request")
    reader = LogReader(folder, parse_key(key))
    if index is None:
        members = map(parse, reader.entries())
        named = (
            place for place, entry in enumerate(members) if (entry["kind"], entry.get("request_id")) == ("intent", request)
        )
        index = next(named, None)
        if index is None:
            raise SettingsError(f"the log has no request {request}")
    typer.echo(reader.proof(index).text(), nl=False)


@audit_app.command("check-receipt")
def audit_check_receipt(
    proof: Annotated[Path, typer.Argument(help="The client's proof: `reply.audit.text()`, or the value of Lacre-Audit.")],
    folder: Folder,
    key: KeyOption = None,
) -> None:
    """Check a client's proof against the log: the entry is still there, and the log extends the proven tree."""
    from lacre.evidence.audit_proof import AuditProof
    from lacre_gateway.audit.check import check_receipt
    from lacre_gateway.audit.reader import LogReader

    text = read_file(proof).decode("utf-8", "replace")
    kept = AuditProof.parse(text) if text.startswith("c2sp.org/") else AuditProof.parse_header(text.strip())
    check_receipt(kept, LogReader(folder, parse_key(key)))
    typer.echo(f"entry {kept.index} is in the log, and the log extends the proven tree")


@audit_app.command("tail")
def audit_tail(
    folder: Folder,
    lines: Annotated[int, typer.Option("-n", help="How many entries.", min=0)] = 10,
    follow: Annotated[bool, typer.Option("-f", help="Keep printing new entries.")] = False,
    key: KeyOption = None,
) -> None:
    """Print the newest entries, one a line."""
    from lacre_gateway.audit.reader import LogReader

    reader = LogReader(folder, parse_key(key))
    at = max(0, reader.size - lines)
    while True:
        for data in reader.entries(at):
            typer.echo(data.decode())
        at = reader.size
        if not follow:
            return
        sys.stdout.flush()
        time.sleep(0.5)
        reader = LogReader(folder, parse_key(key))


@audit_app.command("query")
def audit_query(
    folder: Folder,
    subject: Annotated[str | None, typer.Option(help="Who asked.")] = None,
    tenant: Annotated[str | None, typer.Option(help="For which tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model.")] = None,
    decision: Annotated[str | None, typer.Option(help="allow or deny.")] = None,
    outcome: Annotated[str | None, typer.Option(help="answered, refused, client-gone, broken or interrupted.")] = None,
    request: Annotated[str | None, typer.Option(help="A request's id.")] = None,
    kind: Annotated[str | None, typer.Option(help="intent, annex, outcome, admin or event.")] = None,
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
    from lacre_gateway.audit import index as indexes
    from lacre_gateway.audit.reader import LogReader

    database = indexes.build(LogReader(folder, parse_key(key)), index)
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
        for entry in indexes.find(database, wanted, seconds(since), seconds(until), limit):
            typer.echo(entry)
    database.close()


def seconds(moment: datetime | None) -> float | None:
    """Seconds since the epoch; a moment without a zone is in UTC."""
    return None if moment is None else moment.replace(tzinfo=UTC).timestamp()


def parse_key(text: str | None) -> bytes | None:
    """The key in `--key`. Raises SettingsError."""
    from lacre.errors import InvalidMessage
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
