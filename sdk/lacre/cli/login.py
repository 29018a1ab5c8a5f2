"""`lacre login` and `lacre logout`: a person's own access token, for the command, the proxy and programs on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import Url, err, printable, say, waiting

if TYPE_CHECKING:
    import httpx2

    from lacre.cli.link_file import LinkFile
    from lacre.transport.device_grant import LoginServer
    from lacre.transport.login import SavedLogin


def login(
    issuer: Annotated[str, typer.Option(help="The OpenID provider, as in the tokens' `iss`.", envvar="LACRE_ISSUER")],
    client_id: Annotated[str, typer.Option(help="The public client that the provider knows.", envvar="LACRE_CLIENT_ID")],
    scope: Annotated[str | None, typer.Option(help="Scopes to ask for, as 'openid offline_access'.")] = None,
    browser: Annotated[
        bool | None,
        typer.Option("--browser/--device", help="Log in here, or on any device. Default: here, if there is a browser."),
    ] = None,
    url: Url = None,
    file: Annotated[bool, typer.Option("--file", help="Keep the refresh token in a file, and not in the keyring.")] = False,
) -> None:
    """Log in on a web page. Later commands and programs of this user need no LACRE_TOKEN for this connection string."""
    from lacre.transport.browser_grant import has_browser
    from lacre.transport.device_grant import LoginServer
    from lacre.transport.login import LoginStore, login_http

    store = LoginStore.default(_root(url))
    with login_http() as http:
        server = LoginServer.discover(http, issuer)
        here = browser if browser is not None else server.page_url is not None and has_browser()
        saved = _here(http, server, client_id, scope) if here else _anywhere(http, server, client_id, scope)
    hidden = store.save(saved, in_file=file)
    say(f"logged in; the refresh token is in {'the keyring' if hidden else store.path}")


def _here(http: httpx2.Client, server: LoginServer, client_id: str, scope: str | None) -> SavedLogin:
    from contextlib import ExitStack

    from lacre.cli.link_file import LinkFile
    from lacre.runtime import tasks
    from lacre.transport.browser_grant import in_browser

    with ExitStack() as shown:

        def opening(page: str) -> None:
            err().print(f"open {printable(page)}", markup=False, soft_wrap=True)
            # With the address's `state` and challenge, another user could log this one in as somebody else.
            file = shown.enter_context(LinkFile(f"login-{os.getpid()}", page, instead="use --device"))
            tasks.thread("browser", lambda: _open(file))

        return in_browser(http, server, client_id, scope, opening)


def _open(file: LinkFile) -> None:
    file.open()


def _anywhere(http: httpx2.Client, server: LoginServer, client_id: str, scope: str | None) -> SavedLogin:
    from lacre.transport.device_grant import DeviceCode, wait

    asked = DeviceCode.ask(http, server, client_id, scope)
    err().print(f"open {printable(asked.page)} and enter {printable(asked.code)}", markup=False, soft_wrap=True)
    if asked.whole_page is not None:
        err().print(f"or open {printable(asked.whole_page)}", markup=False, soft_wrap=True)
    with waiting("waiting for you to confirm"):
        return wait(http, server, client_id, asked, scope=scope)


def _root(url: str | None) -> bytes:
    """Of the deployment that the login is for."""
    from lacre.runtime import arguments
    from lacre.trust.chain import ConnectionString

    return ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL")).root


def logout(url: Url = None) -> None:
    """End the login: forget it on this machine, and make its refresh token void at the login server."""
    from lacre.transport.login import LoginStore, login_http

    with login_http() as http:
        revoked = LoginStore.default(_root(url)).end(http)
    say("logged out")
    if not revoked:
        err().print("the login server did not confirm it: end the session on its page too", markup=False, soft_wrap=True)
