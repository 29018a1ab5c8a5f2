"""`lacre proxy`: an OpenAI-compatible server on loopback, for programs in any language."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import socket
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lacre.cli import lock
from lacre.cli.output import AsJson, PinModel, PoolName, Url, err, pins, say, waiting
from lacre.cli.page import PageOpening, prices_in
from lacre.errors import SettingsError
from lacre.runtime import private_files, shell, tasks
from lacre.runtime.hosts import is_loopback

if TYPE_CHECKING:
    from lacre.proxy import ProxyAccess

DEFAULT_PORT: Final = 11435
MIN_KEY: Final = 32  # characters: a program on the same machine could guess a shorter one
MAX_KEY: Final = 4096  # bytes read of the file
CONNECTIONS: Final = 400  # at a time: below the usual limit of 1024 open files, with as many again to the gateway
GRACE: Final = 5  # seconds that running answers have when the proxy ends


def proxy(
    url: Url = None,
    pool: PoolName = None,
    pin_model: PinModel = None,
    port: Annotated[int, typer.Option(help="The port; 0 picks a free one.", min=0, max=65535)] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    key_file: Annotated[
        Path | None, typer.Option(help="The file for the key; created if missing. Without it, each start makes a new key.")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen beyond loopback, where prompts cross the network unsealed.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name of this machine that callers use beside loopback's.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call, as http://localhost:3000.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Also serve a chat page here, and open it in the browser.")] = False,
    browser: Annotated[bool, typer.Option(help="With --open: open the browser, or only print the page's link.")] = True,
    prices: Annotated[
        Path | None,
        typer.Option(help="A TOML file with a table `prices`, as in the gateway's plans.toml: the page shows costs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve OpenAI's API on loopback, sealing every request. Ctrl-C ends it."""
    from lacre.proxy import ProxyAccess
    from lacre.runtime.served_hosts import base_url

    check_host(host, allowed=allow_remote)
    if open_page and not is_loopback(host):
        raise SettingsError(f"the chat page is only served on loopback: use --open without --host {host}")
    known = None if prices is None else prices_in(prices)
    pinned = pins(pin_model)
    key = secrets.token_urlsafe(32) if key_file is None else key_from(key_file)
    with listening(host, port) as listener:
        port = listener.getsockname()[1]
        door = ProxyAccess.on(port, key, names=allow_host or (), origins=allow_origin or (), listening=host)
        shown = base_url(host, port)
        opening = PageOpening(_origin(shown), browser=browser) if open_page else None
        link = None if opening is None else opening.door.link()
        told = _as_json(shown, key, key_file, link) if as_json else _as_shell(shown, key, key_file)
        if door.hosts.everywhere:
            elsewhere = f"other machines: http://ADDRESS:{port}/v1, with an address of this machine; a name needs --allow-host"
            err().print(elsewhere, markup=False, style="dim", soft_wrap=True)
        if opening is not None and link is not None and not as_json:
            err().print(f"chat page (works once, for ten minutes): {link}", markup=False, soft_wrap=True)
        asyncio.run(tasks.run(_serve(url, pool, pinned, known, door, listener, told, opening, link)))


def check_host(host: str, *, allowed: bool) -> None:
    """Raises SettingsError for an address beyond loopback that was not allowed, and for text that is not an address."""
    if is_loopback(host):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError as exc:
        raise SettingsError(f"--host {host} is not an address; the usual one is 127.0.0.1") from exc
    if not allowed:
        raise SettingsError(
            f"other machines can reach {host}, so prompts would cross the network unsealed: run the proxy where "
            "the program runs, or pass --allow-remote"
        )


def key_from(path: Path) -> str:
    """The key in a file of mode 0600; a new one if there is none. Raises SettingsError."""
    try:
        with suppress(FileExistsError):
            private_files.create(path, f"{secrets.token_urlsafe(32)}\n".encode())
        if not path.is_file():
            raise SettingsError(f"{path} is not a file: name one with --key-file")
        private_files.check(path, path.stat().st_mode)
        with path.open("rb") as file:
            key = file.read(MAX_KEY + 1).decode("ascii", "replace").strip()
    except OSError as exc:
        raise SettingsError(f"{path} cannot be used ({exc.strerror}): name another file with --key-file") from exc
    if not MIN_KEY <= len(key) <= MAX_KEY or not key.isascii() or len(key.split()) != 1:
        raise SettingsError(f"{path} must hold one key of at least {MIN_KEY} characters: remove it to get a new one")
    return key


def listening(host: str, port: int) -> socket.socket:
    """The listening socket. Raises SettingsError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        why = str(exc.strerror).partition(" (")[0]  # Python adds the address, which is said already
        raise SettingsError(f"port {port} of {host} is not available ({why}): choose another with --port") from exc


async def _serve(
    url: str | None,
    pool: str | None,
    pinned: dict[str, str] | None,
    prices: dict[str, Any] | None,
    door: ProxyAccess,
    listener: socket.socket,
    told: str,
    opening: PageOpening | None,
    link: str | None,
) -> None:
    import uvicorn

    from lacre.client import AsyncClient
    from lacre.page.app import beside
    from lacre.proxy import create_app
    from lacre.runtime.listening import BoundedConfig, Door

    async with AsyncClient(url, pool=pool, pin_models=pinned, prices=prices) as client:
        with waiting("fetching the manifest"):
            await client.models()  # reports at once, and not to each caller, why sealing cannot work
        app = create_app(client, door)
        if opening is not None:
            app = beside(app, opening.app(client, pinned, priced=prices is not None))
        config = BoundedConfig(
            app,
            Door(connections=CONNECTIONS, encoded_slashes=True),  # a model's name may hold one
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        server = uvicorn.Server(config)
        say(told)
        err().print(lock.line(client.verification), markup=False, style="green")
        with suppress(KeyboardInterrupt), nullcontext() if opening is None or link is None else opening.shown(link):
            await server.serve([listener])


def _as_shell(base_url: str, key: str, key_file: Path | None) -> str:
    lines = [
        shell.exported("OPENAI_BASE_URL", base_url),
        shell.exported("ANTHROPIC_BASE_URL", _origin(base_url)),
    ]
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        read = None if key_file is None else f'export {name}="$(cat {shell.quoted(str(key_file.resolve()))})"'
        lines.append(read or shell.exported(name, key))
    return "\n".join(lines)


def _as_json(base_url: str, key: str, key_file: Path | None, link: str | None) -> str:
    shown = {"api_key": key} if key_file is None else {"key_file": str(key_file.resolve())}
    return json.dumps({"base_url": base_url, "origin": _origin(base_url), **shown, **({} if link is None else {"page": link})})


def _origin(base_url: str) -> str:
    """Clients of Anthropic's API add the `/v1` themselves."""
    return base_url.removesuffix("/v1")
