"""The `lacre` sub-commands that provision and run a machine's Lacre, and change its keys.

`up`, `demo`, `token`, `keys`, `signer`, `root`, `fabric`, `manifest publish`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from lacre.cli import manifest_app
from lacre.cli.output import AsJson, printable, say_table, waiting
from lacre.runtime import tasks

if TYPE_CHECKING:  # what a command needs is imported when it runs
    from lacre_fabric.keys.generations import Generation
    from lacre_fabric.nats.connection import Connection
    from lacre_fabric.operate.rotation import Rotated
    from lacre_fabric.operate.site import Site

MAX_WORKERS: Final = 16  # of `lacre up`: each holds its models and caches in this machine's memory

State = Annotated[Path | None, typer.Option(help="The state folder; $XDG_STATE_HOME/lacre where left out.")]

Pools = Annotated[list[str] | None, typer.Option(help="A pool; may be repeated. All of them where left out.")]
Grace = Annotated[
    float | None,
    typer.Option(
        help="Seconds for which the old key stays in the manifest; 13 hours where left out.", min=0, metavar="SECONDS"
    ),
]
KmsAddress = Annotated[
    str | None,
    typer.Option(help="The address of the key that wraps the pools' keys (docs/kms.md); for a new state.", metavar="ADDRESS"),
]
RotateHours = Annotated[float, typer.Option(help="Rotate the pools' keys this often; 0 never does.", min=0)]

token_app = typer.Typer(name="token", help="Access tokens of the development issuer.", no_args_is_help=True)
keys_app = typer.Typer(name="keys", help="The keys of a state folder, and those of its pools.", no_args_is_help=True)
signer_app = typer.Typer(name="signer", help="The key that signs manifests.", no_args_is_help=True)
root_app = typer.Typer(name="root", help="The key that applications pin.", no_args_is_help=True)
fabric_app = typer.Typer(name="fabric", help="Message servers of one's own.")


def register(app: typer.Typer) -> None:
    """Adds the commands, where what they need is installed."""
    if find_spec("nats") is None or find_spec("pydantic") is None:
        return
    app.add_typer(token_app)
    for group in (keys_app, signer_app, root_app, fabric_app):
        app.add_typer(group)
    manifest_app.command("publish")(manifest_publish)
    if find_spec("fastapi") is not None and find_spec("llama_cpp") is not None:
        app.command()(up)
        app.command()(demo)


def up(
    state: State = None,
    port: Annotated[int, typer.Option(help="The gateway's port; 0 picks a free one.", min=0, max=65535)] = 8321,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="A GGUF file, or the default model's name; may be repeated. Default: what this state served last, or else the "
            "default model."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="How many workers serve the models.", min=1, max=MAX_WORKERS)] = 1,
    rotate_hours: RotateHours = 24.0,
    kms: KmsAddress = None,
) -> None:
    """Run a whole Lacre on this machine: keys, message server, gateway and workers. Ctrl-C ends it.

    A worker that dies is started again.
    """
    from lacre_fabric.operate.rotation import Schedule
    from lacre_fabric.operate.up import default_state, running

    folder = (state or default_state()).resolve()
    schedule = Schedule(every=rotate_hours * 3600 or None)
    # Links stay: a store of models may call the file itself by its digest.
    files = [Path(os.path.normpath(path.absolute())) for path in model or []]

    def tell(line: str) -> None:
        with suppress(OSError):  # nobody reads it any more: no reason to end
            typer.secho(printable(line), dim=True, err=True)  # unbroken, to be copied

    async def run() -> None:
        with ExitStack() as starting:
            starting.enter_context(waiting("starting a message server, a gateway and workers"))
            everything = running(folder, port, files, schedule=schedule, kms=kms, workers=workers, tell=tell)
            async with everything as (live, supervisor):
                starting.close()
                typer.echo(f"ready {live.connection_string}")
                tell(f"In another shell:  . {shlex.quote(str(live.site.folder / 'env'))} && lacre chat")
                await supervisor.watch()

    asyncio.run(_until_signalled(run()))


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False) -> None:
    """Start everything in a temporary state, and show one sealed chat from both sides."""
    from lacre_fabric.operate import demo as show

    async def run() -> None:
        result = await show.demo(Console(stderr=as_json))
        if as_json:
            typer.echo(show.as_json(result))

    if (number := asyncio.run(_until_signalled(run()))) is not None:
        raise typer.Exit(128 + number)  # as shells tell it: there was no demonstration


async def _until_signalled(coroutine: Coroutine[None, None, None]) -> int | None:
    """SIGINT and SIGTERM cancel it, so that it ends what it started. Which one it was; None where it ended by itself."""
    task = tasks.spawn("command", tasks.run(coroutine))
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        return came[0] if came else None
    return None


@token_app.command("issue")
def token_issue(
    subject: Annotated[str, typer.Argument(help="Whom it speaks for.")] = "developer",
    state: State = None,
    group: Annotated[list[str] | None, typer.Option(help="A group; may be repeated.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope; may be repeated.")] = None,
    hours: Annotated[float, typer.Option(help="How long it is valid.", min=0.01, max=24 * 31)] = 24.0,
    dpop: Annotated[
        Path | None, typer.Option(help="Bind it to the key in this file, which is made where there is none.")
    ] = None,
) -> None:
    """Print an access token. For one's own machine: a deployment has an OIDC provider."""
    from lacre.jose.dpop import ProofKey
    from lacre_fabric.keys.secret_files import read_ed25519, write_secret
    from lacre_fabric.operate import dev_issuer
    from lacre_fabric.operate.up import default_state

    key = read_ed25519((state or default_state()) / "issuer.pem")
    if dpop is not None and not dpop.exists():
        write_secret(dpop.resolve(), ProofKey.generate().pem())
    bound_to = None if dpop is None else ProofKey.load(dpop).thumbprint
    lifetime = hours * 3600
    typer.echo(dev_issuer.issue(key, subject, groups=group or (), scopes=scope or (), lifetime=lifetime, bound_to=bound_to))


@keys_app.command("init")
def keys_init(
    state: State = None,
    pool: Annotated[list[str] | None, typer.Option(help="A pool; may be repeated.")] = None,
    kms: KmsAddress = None,
) -> None:
    """Make root, signer, issuer, gateway and pool keys where there are none, and print the root that applications pin."""
    from lacre.jose.jws import b64u
    from lacre_fabric.nats import subjects
    from lacre_fabric.operate.served_models import DEFAULT_MODEL
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import POOL, default_state

    for name in pool or ():
        subjects.check_name("pool", name)
    site = Site((state or default_state()).resolve(), dict.fromkeys(pool or [POOL], (DEFAULT_MODEL,)))
    if kms is not None:
        site.choose_kms(kms)
    site.create()
    typer.echo(f"root {b64u(site.root)}")


@keys_app.command("rotate")
def keys_rotate(
    state: State = None,
    pool: Pools = None,
    grace: Grace = None,
    wait: Annotated[float, typer.Option(help="Seconds for the workers to take the new key up.", min=0)] = 30.0,
) -> None:
    """Make new pool keys and retire the old ones; requests go on meanwhile.

    The workers take up the new key first, then the manifest lists both. When the grace is over the old one leaves the manifest
    and is destroyed: by `lacre up`, or by the next `lacre keys tend`.
    """
    from lacre.errors import SettingsError
    from lacre_fabric.operate.rotation import GRACE, Failures, retire, rotate

    site = _site(state)
    if unknown := set(pool or ()) - set(site.pools):
        raise SettingsError(f"no pool {', '.join(sorted(unknown))}: there is {', '.join(sorted(site.pools))}")

    async def run() -> None:
        failures = Failures()  # pools are independent
        async with _provisioner(site) as connection:
            with failures.kept():
                await retire(site, connection)
            for name in pool or site.pools:
                with failures.kept(name):
                    with waiting("the workers take up the new keys"):
                        rotated = await rotate(site, connection, name, grace=GRACE if grace is None else grace, wait=wait)
                    _tell(rotated)
        failures.raised()

    asyncio.run(run())


@keys_app.command("rewrap")
def keys_rewrap(
    to: Annotated[str, typer.Option(help="The address of the key to wrap with (docs/kms.md).", metavar="ADDRESS")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="The one that wraps now; what the state says where left out.", metavar="ADDRESS"),
    ] = None,
    state: State = None,
) -> None:
    """Move the pools' keys and receipt keys to another key management service, or away from one.

    Nothing is changed before every key is known to open. What a run that was broken off had moved, the next one leaves.
    """
    from lacre_fabric.operate.rewrapping import rewrap

    site = _site(state)

    async def run() -> None:
        async with site.changing():
            for moved in rewrap(site, source or site.kms, to):
                typer.echo(f"{moved.path.relative_to(site.folder)}: {'was moved before' if moved.before else 'moved'}")

    asyncio.run(run())
    typer.echo(f'the workers\' settings: kms = "{to}". Workers that run go on with what they hold; start them anew with it.')


@keys_app.command("tend")
def keys_tend(
    state: State = None,
    rotate_hours: RotateHours = 24.0,
    grace: Grace = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="Go on until SIGTERM, and make queues again that the message server lost.")
    ] = False,
) -> None:
    """Do whatever is due: a new pool key, the end of an old one, a fresh manifest. For cron, each hour, without `lacre up`."""
    from lacre_fabric.operate import floods
    from lacre_fabric.operate.rotation import GRACE, KEPT_UP, Schedule, tend, upkeep

    site = _site(state)
    schedule = Schedule(every=rotate_hours * 3600 or None, grace=GRACE if grace is None else grace)

    async def run() -> None:
        async with _provisioner(site) as connection:
            if stay:
                upkept = partial(upkeep, site, connection, schedule, provisioning=True)
                background = [tasks.start("upkeep", upkept, restart=KEPT_UP)]
                if site.credential_file("warden").exists():
                    watched = partial(floods.watch, site.servers, site.credential("warden"))
                    background.append(tasks.start("floods", watched, restart=floods.WATCHED))
                else:
                    floods.not_watched("the state folder has no credential `warden`")
                try:
                    await asyncio.Event().wait()
                finally:
                    for each in background:
                        await each.close()
            else:
                await tend(site, connection, schedule)

    asyncio.run(_until_signalled(run()))


@keys_app.command("list")
def keys_list(state: State = None, as_json: AsJson = False) -> None:
    """Show the pools' keys, and what becomes of them."""
    site = _site(state)
    rows = [
        (name, config.key_id, config.kem.label, _state(generation))
        for name in site.pools
        for generation in site.generations(name).live
        for config in generation.configs
    ]
    if as_json:
        typer.echo(json.dumps([dict(zip(("pool", "key", "kem", "state"), row, strict=True)) for row in rows], indent=2))
        return
    say_table(("pool", "key", "KEM", "state"), [tuple(map(str, row)) for row in rows])


def _state(generation: Generation) -> str:
    if generation.listed_at is None:
        return "staged: waits for the workers"
    if generation.retire_at is None:
        return f"current since {_date(generation.listed_at)}"
    if generation.unlisted_at is None:
        return f"leaves the manifest at {_date(generation.retire_at)}"
    return f"destroyed after {_date(generation.unlisted_at + generation.drain)}"


def _tell(rotated: Rotated) -> None:
    new = ", ".join(f"{config.key_id} ({config.kem.label})" for config in rotated.listed)
    typer.echo(f"pool {rotated.pool}: key {new}")
    for generation in rotated.retiring:
        ids = ", ".join(map(str, generation.ids))
        typer.echo(f"  {ids}: {_state(generation)}")
    for node in sorted(rotated.lacking):
        typer.echo(f"  worker {node} has not taken up the new key: see that it reads the pool's keys", err=True)


@signer_app.command("rotate")
def signer_rotate(state: State = None) -> None:
    """Make a new signer: the root names it, it signs the manifest, and the old one is destroyed."""
    site = _site(state)
    _change(site, lambda: site.authority.rotate_signer(time.time()))
    chain = site.authority.chain()
    typer.echo(f"signer until {_date(chain.until)}")


@root_app.command("rotate")
def root_rotate(state: State = None) -> None:
    """Make a new root, which the old one hands over to before it is destroyed. Prints the connection string that pins it.

    Applications that pin an older root go on: they follow the chain.
    """
    site = _site(state)
    published = _change(site, lambda: site.authority.rotate_root(time.time()))
    site.write_env(site.base_url)
    url = site.connection_string(site.base_url)
    if published and not _served(url):
        typer.echo(f"the gateway at {site.base_url} does not serve the new root yet: wait until it does", err=True)
    typer.echo(url)


def _change(site: Site, change: Callable[[], object]) -> bool:
    """Changes the chain, publishes what follows, and destroys the key that was replaced. Whether it could be published."""
    from lacre_fabric.operate.rotation import publish
    from lacre_fabric.work.contract import FabricUnavailable

    async def run() -> bool:
        async with site.changing():
            change()
        try:
            async with _provisioner(site) as connection:
                await publish(site, connection)
        except FabricUnavailable as exc:
            typer.echo(f"not published yet: {exc}; `lacre up` and `lacre manifest publish` will", err=True)
            async with site.changing():
                site.authority.settle()
            return False
        return True

    return asyncio.run(run())


def _served(url: str) -> bool:
    """Whether the gateway lets an application in that pins what `url` says; it is given the time to learn of it."""
    from lacre.client import fetch_manifest
    from lacre.errors import LacreError
    from lacre.trust.manifest_store import VersionMemory
    from lacre_fabric.nats.manifest_feed import POLL

    deadline = time.monotonic() + 2 * POLL
    while True:
        try:
            fetch_manifest(url, memory=VersionMemory())
        except LacreError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        else:
            return True


def manifest_publish(state: State = None) -> None:
    """Sign the next version of the manifest and put it on the fabric, with the queues that it lacks."""
    from lacre_fabric.nats.provisioning import provision
    from lacre_fabric.operate.rotation import publish

    site = _site(state)

    async def run() -> None:
        async with _provisioner(site) as connection:
            await provision(connection, site.pools, replicas=site.replicas, regions=site.regions)
            await publish(site, connection)

    asyncio.run(run())
    typer.echo("published")


@fabric_app.callback()
def fabric() -> None:
    """Message servers of one's own."""


@fabric_app.command("accounts")
def fabric_accounts(state: State = None) -> None:
    """Print the accounts of a nats-server of one's own, passwords in them: its configuration includes them.

    One credential for all instances of the gateway and one for all workers of a pool, made in the state folder's `fabric`.
    """
    from lacre_fabric.nats.accounts import accounts
    from lacre_fabric.operate import nats_conf

    typer.echo(nats_conf.encode({"accounts": accounts(_site(state).replicated_roles())}).decode(), nl=False)


@fabric_app.command("bundles")
def fabric_bundles(
    nats: Annotated[str, typer.Option(help="Where the message server will be, as nats://HOST:PORT.")],
    public_url: Annotated[str, typer.Option(help="Where clients will find the gateway.")],
    state: State = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's name, for /models/NAME.gguf; may be repeated. Default: the pool's models so far, or else the "
            "default model."
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="The pool that serves them.")] = "default",
) -> None:
    """Write what each process gets where they run apart, in containers say: its settings and the secrets it may have.

    Makes keys where there are none, and prints the connection string that applications pin. Run again, it adds the pool and its
    models to the others of this state, and removes nothing: take out of `site.json` by hand what shall go.
    """
    from lacre_fabric.nats import subjects
    from lacre_fabric.operate.bundles import Bundles
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import check_state, default_state

    folder = (state or default_state()).resolve()
    check_state(folder)
    site = Site(folder, {subjects.check_name("pool", pool): tuple(model or ())})
    Bundles(site, nats, public_url).write()
    typer.echo(site.connection_string(public_url))


@fabric_app.command("check")
def fabric_check(state: State = None, as_json: AsJson = False) -> None:
    """Look whether the message servers are what Lacre needs, and what is weak. Exits with 1 where something is wrong."""
    from dataclasses import asdict
    from io import StringIO

    from lacre_fabric import logs
    from lacre_fabric.operate.fabric_check import Severity, inspect

    site = _site(state)
    logs.configure(StringIO())  # what is denied on purpose; the findings say what matters
    found = asyncio.run(inspect(site.servers, site.pools, site.replicas, site.credentials(), site.regions))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        told = [(finding.verdict.value, finding.check, finding.detail, finding.remedy) for finding in found]
        say_table(("", "check", "found", "what to do"), told)
    if any(finding.verdict is Severity.WRONG for finding in found):
        raise typer.Exit(1)


def _site(state: Path | None) -> Site:
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state

    return Site.load((state or default_state()).resolve())


@asynccontextmanager
async def _provisioner(site: Site) -> AsyncIterator[Connection]:
    from lacre_fabric.nats.connection import Connection

    connection = await Connection.open(site.servers, site.credential("provisioner"))
    try:
        yield connection
    finally:
        await connection.close()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
