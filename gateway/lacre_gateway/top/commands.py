"""`lacre top`: what a gateway does now, live in a terminal."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lacre_gateway.admin.api_commands import AsJson, with_api

if TYPE_CHECKING:
    from lacre_gateway.admin.calls import AdminApi
    from lacre_gateway.top.screen import Look

EVERY: Final = 5.0  # seconds between looks: each is a decision and an entry of the audit log
MINUTE: Final = 60.0  # seconds between looks at the minutes
_ALL: Final = 10_000  # lines: room for every worker


def register(app: typer.Typer) -> None:
    app.command()(top)


@with_api
def top(
    api: AdminApi,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=1)] = EVERY,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end, as it does without a terminal.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show live what a gateway does: readiness, pools, workers and the last hour. Ctrl-C ends it.

    It asks the admin API as the holder of the access token. Workers and the last hour need the gateway's console.
    """
    from lacre.cli.output import at_terminal, out, say_json
    from lacre_gateway.top.screen import drawn

    look = looked(api, None, minutes=True)
    if as_json:
        say_json({
            "status": look.status.model_dump(mode="json"),
            "workers": None if look.workers is None else [one.model_dump(mode="json") for one in look.workers],
            "minutes": None if look.minutes is None else [one.model_dump(mode="json") for one in look.minutes],
        })  # fmt: skip
    elif once or not at_terminal():
        out().print(drawn(look, time.time(), out().width, _ALL))
    else:
        with suppress(KeyboardInterrupt):
            _live(api, look, every)


def _live(api: AdminApi, look: Look, every: float) -> None:
    """Raises a refusal of the gateway; a gateway that is away for a while is shown as that."""
    from dataclasses import replace

    from rich.live import Live

    from lacre.cli.output import out
    from lacre.errors import NetworkError, Unavailable
    from lacre_gateway.top.screen import drawn

    known = time.monotonic()
    with Live(console=out(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(drawn(look, time.time(), *out().size), refresh=True)
            time.sleep(every)
            try:
                due = time.monotonic() - known >= MINUTE
                look = looked(api, look, minutes=due)
                known = time.monotonic() if due else known
            except (NetworkError, Unavailable) as exc:
                look = replace(look, fault=f"no answer since the last look: {exc}")


def looked(api: AdminApi, before: Look | None, *, minutes: bool) -> Look:
    """Asks the gateway. before: the look whose minutes stay unless `minutes`. Raises LacreError."""
    from lacre import problems
    from lacre.errors import RefusedError
    from lacre_gateway.admin.reports import StatusReport
    from lacre_gateway.console.reports import MinutesReport, WorkersReport
    from lacre_gateway.top.screen import Look

    status = api.get("/v1/status", StatusReport)
    try:
        workers = api.get("/v1/workers", WorkersReport).workers
        kept = None if before is None else before.minutes
        told = api.get("/v1/minutes", MinutesReport).minutes if minutes or kept is None else kept
    except RefusedError as exc:
        if exc.problem != problems.NOT_FOUND.type:
            raise
        return Look(status)
    return Look(status, workers, told)
