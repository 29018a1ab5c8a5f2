"""`lacre budget show`. The commands that ask a running gateway are in `admin.budget_commands`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lacre_gateway.budget.additions import Approver
    from lacre_gateway.budget.plans import Plans
    from lacre_gateway.budget.report import Line

budget = typer.Typer(no_args_is_help=True, help="How much of their limits callers have used, and changes of these limits.")


def register(app: typer.Typer) -> None:
    app.add_typer(budget, name="budget")


@budget.command()
def show(
    state: Annotated[
        Path | None, typer.Option(help="The state folder of `lacre up`; its provisioner's credential is used.")
    ] = None,
    audit: Annotated[
        list[Path] | None, typer.Option(help="The audit log of a gateway; repeat it for all gateways to check the sums.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Show every limit that was drawn from: used, leased and forfeited. Exit code 1 if the sums are wrong."""
    from lacre.cli.output import say_json
    from lacre_fabric.operate.up import default_state

    folder = state or default_state()
    plans = _plans(folder)
    currency = None if plans is None else plans.currency
    shown = asyncio.run(_shown(folder, audit, plans, _approver(folder)))
    for line in shown:
        if as_json:
            say_json(line.members(currency))
            continue
        typer.echo(_text(line, currency))
        for lease in line.leases:
            typer.echo(f"    {lease.holder}: {_amount(line, lease.drawn)} drawn, {_amount(line, lease.used)} used" + (
                f", lost: {_amount(line, lease.forfeited)} forfeited" if lease.lost else ""
            ))  # fmt: skip
    wrong = [line for line in shown if line.wrong]
    for line in wrong:
        typer.echo(f"wrong: {line.name}, {line.kind.value}: {line.wrong}", err=True)
    if wrong:
        raise typer.Exit(1)


@budget.command()
def report(
    audit: Annotated[list[Path], typer.Option(help="The audit log of a gateway; repeat it for all gateways.")],
    by: Annotated[
        str, typer.Option(help="What the rows are, with commas: tenant, user, issuer, model, pool, plan, day, month.")
    ] = "tenant,month",
    since: Annotated[datetime | None, typer.Option(help="Requests from this time on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Requests before this time, UTC.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row, for programs.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV (RFC 4180), for a spreadsheet.")] = False,
) -> None:
    """Add up what tenants and users have used, from audit logs and their successors. `lacre audit verify` checks the logs."""
    from dataclasses import astuple

    from lacre.cli.output import say_csv, say_json, say_table
    from lacre_gateway.audit import chain, feed
    from lacre_gateway.audit.commands import counted, seconds
    from lacre_gateway.audit.entries import parse
    from lacre_gateway.budget.bill import COUNTS, bill, groups_of
    from lacre_gateway.budget.plans import money

    groups = groups_of(by)
    entries = counted("adding up", (entry for folder in audit for entry in feed.entries(folder)), audit)
    made = bill(map(parse, entries), groups, seconds(since), seconds(until))
    headings = (*groups, *COUNTS)
    rows = [(*place, *map(str, astuple(line)[:-1]), money(line.money)) for place, line in made.lines.items()]
    if as_json:
        for place, line in made.lines.items():
            say_json(dict(zip(headings, (*place, *astuple(line)), strict=True)))
    elif as_csv:
        say_csv(headings, rows)
    else:
        say_table(headings, rows)
    for folder in audit:
        if (erased := sum(part.erased for part in chain.parts(folder, None))) > 0:
            typer.echo(f"warning: {erased} logs of {folder} were erased: their requests are missing", err=True)
    if made.unplaced:
        typer.echo(f"warning: {made.unplaced} outcomes have their request in an erased or missing log: not counted", err=True)
    if made.open:
        typer.echo(f"{made.open} requests have no outcome yet", err=True)


def _plans(state: Path) -> Plans | None:
    """Those of the state folder's gateway; None if there is none here."""
    from lacre_fabric.operate.site import Site
    from lacre_gateway.budget.plans import PLANS_FILE, load
    from lacre_gateway.settings import load as load_settings
    from lacre_gateway.settings import shipped

    settings = Site.load(state).gateway_settings
    if not settings.exists():
        return None
    folder = load_settings(settings).policies or shipped()
    return load(folder if (folder / PLANS_FILE).exists() else shipped())


def _approver(state: Path) -> Approver | None:
    """Checks additions by the key of the state folder's gateway; None without one: limits are then shown without additions."""
    from lacre.errors import SettingsError
    from lacre.jose.jws import raw_public_key
    from lacre_fabric.keys.secret_files import read_ed25519s
    from lacre_fabric.operate.site import Site
    from lacre_gateway.budget.additions import Approver
    from lacre_gateway.settings import load as load_settings

    try:
        keys = read_ed25519s(load_settings(Site.load(state).gateway_settings).signing_key)
    except SettingsError:
        return None
    approver = Approver(keys[0])
    approver.use(keys[0], [raw_public_key(key) for key in keys])
    return approver


async def _shown(state: Path, audit: list[Path] | None, plans: Plans | None, approver: Approver | None) -> list[Line]:
    """Raises SettingsError, FabricUnavailable or InvalidMessage."""
    from lacre.cli.output import waiting
    from lacre_fabric.nats import subjects
    from lacre_fabric.nats.connection import Connection
    from lacre_fabric.nats.kv import dump
    from lacre_fabric.operate.site import Site
    from lacre_gateway.audit import feed
    from lacre_gateway.audit.commands import counted
    from lacre_gateway.audit.entries import parse
    from lacre_gateway.budget.additions import nothing_counts
    from lacre_gateway.budget.callers import SCOPES
    from lacre_gateway.budget.ledger import ALIVE, GONE_AFTER
    from lacre_gateway.budget.record import Record
    from lacre_gateway.budget.report import lines, settled_by
    from lacre_gateway.budget.windows import windows_at

    site = Site.load(state)
    with waiting("asking the fabric"):
        connection = await Connection.open(site.servers, site.credential("provisioner"))
        try:
            found = await dump(connection, subjects.BUDGETS_BUCKET)
        finally:
            await connection.close()
    now = time.time()
    alive: set[str] = set()
    parts: dict[str, list[bytes]] = {}
    for whole, entry in found.items():
        _, _, key = whole.partition(".")  # without the credential that wrote it
        if key.startswith(f"{ALIVE}.") and entry.time > now - GONE_AFTER:
            alive.add(entry.value.decode("utf-8", "replace"))
        elif key.startswith(SCOPES):
            parts.setdefault(key, []).append(entry.value)
    records = {
        key: Record("")
        .with_others(values, windows_at(now), nothing_counts if approver is None else approver.check(key))
        .merged()
        for key, values in parts.items()
    }
    settled = None
    if audit:
        every = (entry for folder in audit for entry in feed.entries(folder))
        settled = settled_by(map(parse, counted("adding up", every, audit)))
    return list(lines(records, frozenset(alive), settled, plans))


def _text(line: Line, currency: str | None) -> str:
    from lacre_gateway.budget.plans import LimitKind
    from lacre_gateway.budget.windows import label

    when = label(line.kind, line.window)
    forfeited = f", {_amount(line, line.forfeited)} forfeited" if line.forfeited else ""
    drawn = f"{_amount(line, line.drawn)} drawn, {_amount(line, line.used)} used{forfeited}"
    unit = f" {currency}" if currency and line.kind is LimitKind.MONEY_PER_MONTH else ""
    raised = f" ({_amount(line, line.raised)} of it added)" if line.raised else ""
    limit = f", limit {_amount(line, line.ceiling)}{unit}{raised}" if line.ceiling is not None else ""
    reset = f", resets at {datetime.fromtimestamp(line.resets_at, UTC):%Y-%m-%d %H:%M UTC}" if line.resets_at else ""
    return f"{line.name}: {line.kind.value}{f' of {when}' if when else ''}: {drawn}{limit}{reset}"


def _amount(line: Line, amount: int) -> str:
    from lacre_gateway.budget.plans import LimitKind, money

    return money(amount) if line.kind is LimitKind.MONEY_PER_MONTH else str(amount)
