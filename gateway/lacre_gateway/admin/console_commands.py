"""`lacre admin open`: a link to the operators' console, for the person at this terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from lacre_gateway.admin.budget_commands import Address, Ca, SettingsFile, State, TokenFile, api_of

admin_app = typer.Typer(no_args_is_help=True, help="Administer a running gateway.")


def register(app: typer.Typer) -> None:
    app.add_typer(admin_app, name="admin")


@admin_app.command("open")
def open_console(
    admin: Address = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    settings: SettingsFile = None,
    state: State = None,
    browser: Annotated[bool, typer.Option("--browser", help="Also open the link in this machine's browser.")] = False,
) -> None:
    """Print a link that opens the operators' console as the holder of the access token. It works once, for a minute."""
    import webbrowser

    from lacre import problems
    from lacre.cli.output import say
    from lacre.errors import RefusedError, SettingsError
    from lacre_gateway.admin.reports import OpenLink

    with api_of(admin, token_file, ca, settings, state) as api:
        try:
            link = api.post("/v1/console/links", {}, OpenLink)
        except RefusedError as exc:
            if exc.problem != problems.NOT_FOUND.type:
                raise
            raise SettingsError("this gateway has no console: add a table [console] to its settings, and restart it") from exc
    say(link.url)
    if browser:
        webbrowser.open(link.url)
