"""The options of every command that asks a running gateway's admin API: where it is, and as whom to ask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec, get_type_hints

import typer

if TYPE_CHECKING:
    from lacre_gateway.admin.calls import AdminApi

Address = Annotated[
    str | None, typer.Option(help="The address of the admin API; default: that of the settings file.", metavar="URL")
]
TokenFile = Annotated[
    Path | None, typer.Option(help="A file with an administrator's access token; default: LACRE_TOKEN.", metavar="FILE")
]
Ca = Annotated[Path | None, typer.Option(help="The PEM file of the admin API's CA; default: the system's CAs.", metavar="FILE")]
SettingsFile = Annotated[
    Path | None, typer.Option(help="A gateway's settings file; default: the one in the state folder.", metavar="FILE")
]
State = Annotated[Path | None, typer.Option(help="The state folder; default: $XDG_STATE_HOME/lacre.", metavar="FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_OPTIONS: Final = {"admin": Address, "token_file": TokenFile, "ca": Ca, "settings": SettingsFile, "state": State}
_Own = ParamSpec("_Own")


def with_api(command: Callable[Concatenate[AdminApi, _Own], None]) -> Callable[..., None]:
    """The command with these options after its own. It gets the API that they name as its first argument, and nothing of them.

    typer reads a command's options from its signature.
    """

    def asking(**given: Any) -> None:
        with _api(*(given.pop(name) for name in _OPTIONS)) as api:
            command(api, **given)  # type: ignore[call-arg]  # typer calls by name, as the signature says

    own = list(inspect.signature(command).parameters.values())[1:]
    types = get_type_hints(command, localns={"AdminApi": object}, include_extras=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _OPTIONS.items()
    ]
    named = [each.replace(annotation=types[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    asking.__signature__ = inspect.Signature([*named, *shared])  # type: ignore[attr-defined]
    asking.__annotations__ = {each.name: each.annotation for each in (*named, *shared)}
    asking.__name__, asking.__doc__ = command.__name__, command.__doc__
    return asking


def _api(admin: str | None, token_file: Path | None, ca: Path | None, settings: Path | None, state: Path | None) -> AdminApi:
    """Warns of a token that others can read. Raises SettingsError."""
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state
    from lacre_gateway.admin.calls import AdminApi, address_of, admin_token
    from lacre_gateway.settings import load

    if admin is None:
        file = settings or Site.load((state or default_state()).resolve()).gateway_settings
        admin = address_of(load(file), file)
    token = admin_token(token_file)
    if token_file is not None:
        _warn_of_readers(token_file)
    return AdminApi(admin, token, ca)


def _warn_of_readers(file: Path) -> None:
    import shlex
    import stat

    mode = file.stat().st_mode if file.exists() else 0  # it may be a pipe, which is gone by now
    if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
        name = shlex.quote(str(file))
        typer.echo(f"warning: other users can read the token in {file}: run `chmod 600 {name}`", err=True)
