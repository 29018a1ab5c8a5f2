"""`lacre gateway`, `doctor`, `token check`, `revoke`, `audit`, `policy`, `budget`, `admin` and `top`."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre_gateway.admin import budget_commands, console_commands
from lacre_gateway.audit import commands as audit
from lacre_gateway.budget import commands as budget
from lacre_gateway.policy import commands as policy
from lacre_gateway.top import commands as top

if TYPE_CHECKING:
    from lacre_gateway.settings import GatewaySettings


def register(app: typer.Typer) -> None:
    """Adds `lacre audit`, and each other command whose requirements are installed."""
    audit.register(app)
    if find_spec("cedarpy") is not None:
        policy.register(app)
    if find_spec("nats") is not None and find_spec("fastapi") is not None and find_spec("cedarpy") is not None:
        app.command()(gateway)
        app.command()(revoke)
        budget.register(app)
        budget_commands.register(budget.budget)
        console_commands.register(app)
        top.register(app)
        app.command()(doctor)
        from lacre_fabric.operate.commands import token_app

        token_app.command("check")(token_check)


SettingsFile = Annotated[Path, typer.Option(help="The gateway's settings file (TOML).")]


def gateway(
    settings: SettingsFile,
    process: Annotated[int | None, typer.Option(hidden=True, help="Which of several processes this one is.", min=0)] = None,
    port: Annotated[int | None, typer.Option(hidden=True, help="The port that they share.", min=0)] = None,
    instance: Annotated[
        int | None,
        typer.Option(help="The number of this gateway among those of the same name on other machines, from 0.", min=0),
    ] = None,
) -> None:
    """Run a gateway: it authenticates, decides, records and routes sealed requests, and can read none of them."""
    from lacre_fabric.logs import last_words
    from lacre_gateway.settings import load

    with last_words():

        def read() -> GatewaySettings:
            found = load(settings)
            if instance is not None:
                found = found.as_instance(instance)
            return found if process is None else found.for_process(process, port or found.listen.port)

        found = read()
        if process is None and found.processes > 1:
            from lacre_gateway.processes import serve_all

            serve_all(found, settings)
            return
        from lacre_gateway.serve import serve

        serve(found, read)


def doctor(
    settings: Annotated[
        Path | None, typer.Option(help="A gateway's settings file, or a worker's; default: those in the state folder.")
    ] = None,
    worker: Annotated[bool, typer.Option("--worker", help="Check workers instead.")] = False,
    state: Annotated[Path | None, typer.Option(help="The state folder; default: $XDG_STATE_HOME/lacre.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check everything that a gateway or a worker needs, and say how to fix each fault. Exit code 1 if a check fails."""
    from lacre.cli.output import waiting
    from lacre_fabric.logs import only_errors
    from lacre_gateway.doctor import examine
    from lacre_gateway.doctor.report import show
    from lacre_gateway.doctor.worker import examine_workers

    only_errors()
    with waiting("checking"):
        if worker:
            found = examine_workers([settings] if settings is not None else _own_workers(state))
        else:
            found = examine(settings or _own_settings(state))
    if not show(found, as_json=as_json):
        raise typer.Exit(1)


def token_check(
    token: Annotated[
        str | None, typer.Argument(help="The access token; - for stdin. Default: --file, or LACRE_TOKEN, or stdin.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A gateway's settings file; default: the one in the state folder.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the token.")] = None,
    address: Annotated[str, typer.Option(help="The caller's address, for rules that read it.")] = "127.0.0.1",
    state: Annotated[Path | None, typer.Option(help="The state folder; default: $XDG_STATE_HOME/lacre.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Judge an access token as a gateway does, and explain it: issuer, key, claims, tenant, groups, plan, and what it may do.

    Other users of the machine can read a token on the command line: pipe it in, or pass --file. Exit code 3 if it is refused.
    """
    import asyncio

    from lacre.cli.output import exit_code, waiting
    from lacre.errors import Unauthenticated
    from lacre_fabric.logs import only_errors
    from lacre_gateway.doctor.token import TokenReport, ask_fabric, explain
    from lacre_gateway.doctor.token_report import show
    from lacre_gateway.settings import load

    only_errors()
    given = _given_token(token, file)
    found = load(settings or _own_settings(state))

    async def explained() -> TokenReport:
        return await explain(found, given, await ask_fabric(found), address=address)

    with waiting("asking the issuer and the fabric"):
        report = asyncio.run(explained())
    show(report, as_json=as_json)
    if not report.accepted:
        raise typer.Exit(exit_code(Unauthenticated(report.reason, status=401, problem=report.problem)))


def _given_token(argument: str | None, file: Path | None) -> str:
    """The token that the command is about, without spaces around it and the word Bearer. Raises SettingsError."""
    import os

    from lacre.cli.surroundings import read_file, read_stdin, stdin_text, utf8
    from lacre.errors import SettingsError

    if argument not in (None, "-"):
        typer.echo("warning: other users can read a token on the command line: pipe it to `lacre token check -`", err=True)
        given = str(argument)
    elif argument == "-":
        given = stdin_text()
    elif file is not None:
        given = utf8(read_file(file), str(file))
    else:
        given = os.environ.get("LACRE_TOKEN", "") or read_stdin()
    words = given.split()
    if words and words[0].lower() in ("bearer", "dpop"):
        words = words[1:]
    if len(words) != 1:
        raise SettingsError("no token, or several: pipe one to `lacre token check -`, name a --file, or set LACRE_TOKEN")
    return words[0]


def _own_workers(state: Path | None) -> list[Path]:
    """Of the state folder, a settings file for each pool that has workers here."""
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state

    site = Site.load((state or default_state()).resolve())
    return [file for pool in site.pools if (file := site.worker_settings(pool)).exists()]


def _own_settings(state: Path | None) -> Path:
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state

    return Site.load((state or default_state()).resolve()).gateway_settings


def revoke(
    jti: Annotated[str | None, typer.Option(help="The one token with this id (its claim jti).")] = None,
    sub: Annotated[str | None, typer.Option(help="Every token that this subject was issued until now.")] = None,
    issuer: Annotated[str | None, typer.Option(help="The token's issuer; may be omitted if there is only one.")] = None,
    until: Annotated[
        datetime | None, typer.Option(help="When the token expires, in UTC; default: the maximum token lifetime from now.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A gateway's settings file; default: the one in the state folder.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="The state folder; default: $XDG_STATE_HOME/lacre.")] = None,
) -> None:
    """Revoke a token, or all tokens of a subject: every gateway refuses them from now on. This cannot be undone.

    It counts for the gateway's credential. When its share of revocations is full, the state folder's own share is used.
    """
    import asyncio
    import time

    from lacre.cli.output import waiting
    from lacre_fabric.nats.connection import Connection
    from lacre_fabric.nats.revocations import RevocationsFull
    from lacre_fabric.nats.revocations import revoke as put
    from lacre_fabric.nats.roles import Credential
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state
    from lacre_gateway.auth.revocation import revocation
    from lacre_gateway.settings import load

    path = settings or Site.load((state or default_state()).resolve()).gateway_settings
    read = load(path)
    folder = (state or path.resolve().parent.parent).resolve()  # `lacre up` keeps the settings in the state folder
    expires = None if until is None else until.replace(tzinfo=until.tzinfo or UTC).timestamp()
    revoked = revocation(read.issuers, jti=jti, subject=sub, issuer=issuer, until=expires, now=time.time())

    async def as_role(credential: Credential) -> None:
        connection = await Connection.open(read.nats.servers, credential)
        try:
            await put(connection, revoked)
        finally:
            await connection.close()

    async def run() -> None:
        try:
            await as_role(Credential.load(read.nats.credentials))
        except RevocationsFull as exc:
            if not (folder / "site.json").exists():
                raise
            await as_role(Site.load(folder).credential("provisioner"))
            typer.echo(f"warning: {exc}", err=True)

    with waiting("telling the gateways"):
        asyncio.run(run())
    typer.echo(f"revoked until {datetime.fromtimestamp(revoked.until, UTC):%Y-%m-%d %H:%M:%S UTC}")
    typer.echo(f"audit logs name it {revoked.key}")
