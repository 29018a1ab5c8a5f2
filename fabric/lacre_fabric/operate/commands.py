"""The `lacre` sub-commands that provision and run a local Lacre, and change its keys.

`token`, `signer`, `root`, `fabric`, `manifest publish`; `up` and `demo` are in `start_commands`, `keys` in `key_commands`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli import beginnings, manifest_app
from lacre.cli.output import AsJson, say_json, say_table, waiting
from lacre.runtime.hosts import without_secrets
from lacre_fabric.operate.key_commands import date, keys_app
from lacre_fabric.operate.pool_commands import pool_app
from lacre_fabric.operate.start_commands import State, demo, up
from lacre_fabric.operate.state_commands import provisioner, site_of, state_app

if TYPE_CHECKING:  # imported in the command that needs it
    from lacre_fabric.operate.site import Site

token_app = typer.Typer(name="token", help="Access tokens: issue one for development, check one.", no_args_is_help=True)
signer_app = typer.Typer(name="signer", help="The key that signs manifests.", no_args_is_help=True)
root_app = typer.Typer(name="root", help="The key that applications pin.", no_args_is_help=True)
fabric_app = typer.Typer(name="fabric", help="Your own NATS servers.")


def register(app: typer.Typer) -> None:
    """Adds the commands if the packages that they need are installed."""
    if find_spec("nats") is None or find_spec("pydantic") is None:
        return
    if _begin not in beginnings:
        beginnings.append(_begin)
    app.add_typer(token_app)
    for group in (keys_app, signer_app, root_app, fabric_app, pool_app, state_app):
        app.add_typer(group)
    manifest_app.command("publish")(manifest_publish)
    if find_spec("fastapi") is not None and find_spec("llama_cpp") is not None:
        app.command()(up)
        app.command()(demo)


def _begin() -> None:
    from lacre_fabric import logs

    logs.of_command()


@token_app.command("issue")
def token_issue(
    subject: Annotated[str, typer.Argument(help="The subject of the token.")] = "developer",
    state: State = None,
    group: Annotated[list[str] | None, typer.Option(help="A group; may be repeated.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope; may be repeated.")] = None,
    hours: Annotated[float, typer.Option(help="How many hours it is valid.", min=0.01, max=24 * 31)] = 24.0,
    dpop: Annotated[Path | None, typer.Option(help="Bind it to the key in this file; the key is created if missing.")] = None,
) -> None:
    """Print an access token, for use on your own machine. A deployment has an OIDC provider instead."""
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


@signer_app.command("rotate")
def signer_rotate(state: State = None) -> None:
    """Create a new signer. The root authorizes it, it signs the manifest, and the old key is destroyed."""
    site = site_of(state)
    _change(site, lambda: site.authority.rotate_signer(time.time()))
    chain = site.authority.chain()
    typer.echo(f"signer until {date(chain.until)}")


@root_app.command("rotate")
def root_rotate(state: State = None) -> None:
    """Create a new root. The old root hands over to it and is destroyed. Prints the connection string that pins the new root.

    Applications that pin an older root keep working: they follow the chain.
    """
    site = site_of(state)
    published = _change(site, lambda: site.authority.rotate_root(time.time()))
    site.write_env(site.base_url)
    url = site.connection_string(site.base_url)
    if published and not _served(url):
        _say_late(site)
    typer.echo(url)


@root_app.command("replace")
def root_replace(state: State = None) -> None:
    """Create a new root in place of a lost one. Prints the connection string that pins it.

    Applications that pin the lost root work until the signer's statement expires, or the signer changes: move their pins first.
    """
    site = site_of(state)
    until = site.authority.chain().until
    published = _change(site, lambda: site.authority.replace_root(time.time()))
    site.write_env(site.base_url)
    url = site.connection_string(site.base_url)
    if published and not _served(url):
        _say_late(site)
    typer.echo(f"old pins work until {date(until)}; move them before you rotate the signer", err=True)
    typer.echo(url)


def _say_late(site: Site) -> None:
    where = without_secrets(site.base_url)
    typer.echo(f"the gateway at {where} does not serve the new root yet: wait until it does", err=True)


def _change(site: Site, change: Callable[[], object]) -> bool:
    """Changes the chain, publishes the result, and destroys the replaced key. Returns whether it could publish."""
    from lacre_fabric.operate import behind
    from lacre_fabric.operate.rotation import publish
    from lacre_fabric.work.contract import FabricUnavailable

    async def run() -> bool:
        async with site.changing():
            try:
                async with provisioner(site) as connection:
                    await behind.check(site, connection)  # a change by an old copy would fork the chain
            except FabricUnavailable as exc:
                typer.echo(f"not compared with the fabric: {exc}", err=True)
            change()
        try:
            async with provisioner(site) as connection:
                await publish(site, connection)
        except FabricUnavailable as exc:
            typer.echo(f"not published yet: {exc}; run `lacre up` or `lacre manifest publish`", err=True)
            async with site.changing():
                site.authority.settle()
            return False
        return True

    with waiting("publishing the manifest"):
        return asyncio.run(run())


def _served(url: str) -> bool:
    """Whether the gateway works for an application that pins `url`. Waits a moment for the gateway to learn of it."""
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


def manifest_publish(
    state: State = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model and the answer of `lacre model verify --json` for its file. May be repeated, also for one model. "
            "Without FILE, any file may be served under that name.",
            metavar="NAME=FILE",
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="The pool that serves them.")] = "default",
    routes: Annotated[
        Path | None, typer.Option(help="A file with all routes of models to pools (docs/routes.md). Default: those so far.")
    ] = None,
    new_root: Annotated[
        bool, typer.Option("--new-root", help="Also replace the manifest of another root: its applications stop working.")
    ] = False,
) -> None:
    """Sign the next manifest and publish it on the fabric. Creates missing queues.

    It refuses if the fabric has a newer manifest than this state folder signed, for example after a restore. With --model,
    clients refuse answers by other files of that model, from now on and in later manifests.
    """
    from lacre_fabric.operate import behind, model_digests, model_routes
    from lacre_fabric.operate.rotation import publish
    from lacre_fabric.operate.stores import provision_site

    site = site_of(state)
    named = model_digests.named(model or (), site.pools.get(pool, ()))
    routed = None if routes is None else model_routes.read(routes, site.pools)

    async def run() -> None:
        async with provisioner(site) as connection:
            async with site.changing():
                await behind.check(site, connection, new_root=new_root)
                before = model_digests.recorded(site.models_file).get(pool, {})
                model_digests.record(site.models_file, pool, model_digests.merged(before, named))
                if routed is not None:
                    model_routes.record(site.folder, routed)
            await provision_site(site, connection)
            await publish(site, connection, new_root=new_root)

    with waiting("publishing the manifest"):
        asyncio.run(run())
    typer.echo("published")


@fabric_app.callback()
def fabric() -> None:
    """Your own NATS servers."""


@fabric_app.command("accounts")
def fabric_accounts(state: State = None) -> None:
    """Print the accounts for your own nats-server, including passwords. Include them in its configuration.

    All gateway instances share one credential, and so do all workers of a pool. The credentials are in the state's `fabric`
    folder.
    """
    from lacre_fabric.nats.accounts import accounts
    from lacre_fabric.operate import nats_conf

    typer.echo(nats_conf.encode({"accounts": accounts(site_of(state).replicated_roles())}).decode(), nl=False)


@fabric_app.command("replace")
def fabric_replace(
    name: Annotated[str, typer.Argument(help="The credential, such as gateway-g1; `fabric/NAME.json` in the state folder.")],
    state: State = None,
) -> None:
    """Replace the password of a NATS credential while everything runs. Prints what to do next.

    A process that has the new file uses it once the servers know it, and the old password until then.
    """
    from lacre.errors import SettingsError
    from lacre_fabric.nats.roles import Credential

    site = site_of(state)
    known = sorted(file.stem for file in site.credential_file("any").parent.glob("*.json"))
    if name not in known:
        raise SettingsError(
            f"no credential {name}: choose one of {', '.join(known) or 'those that `lacre fabric accounts` makes'}"
        )
    file = site.credential_file(name)
    Credential.new(name).save(file)
    typer.echo(f"1. copy {file} to the processes that use it; they need no restart")
    typer.echo("2. run `lacre fabric accounts` and reload the NATS servers with its output (`lacre up`: restart it)")


@fabric_app.command("bundles")
def fabric_bundles(
    nats: Annotated[str, typer.Option(help="The NATS server's address, as nats://HOST:PORT.")],
    public_url: Annotated[str, typer.Option(help="The gateway's URL for clients.")],
    state: State = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's name, for /models/NAME.gguf; may be repeated. Default: the pool's models so far, or the "
            "default model."
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="The pool that serves them.")] = "default",
) -> None:
    """Write a folder for each process of a distributed deployment, with its settings and only its own secrets.

    Creates missing keys, and prints the connection string that applications pin. A later run adds its pool and models, and
    removes nothing. To remove a pool, use `lacre pool remove`.
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
    """Check that the NATS servers meet Lacre's requirements. Exits with 1 if something is wrong."""
    from dataclasses import asdict
    from io import StringIO

    from lacre_fabric import logs
    from lacre_fabric.operate import behind, stores
    from lacre_fabric.operate.allowed_check import check_allowed
    from lacre_fabric.operate.fabric_check import FabricFinding, Severity, inspect
    from lacre_fabric.operate.state_check import compare, compare_stores
    from lacre_fabric.work.contract import FabricUnavailable

    site = site_of(state)
    logs.configure(StringIO())  # denials are provoked on purpose; the findings report what matters

    async def run() -> list[FabricFinding]:
        found = await inspect(site.servers, site.pools, site.replicas, site.credentials(), site.regions)
        found += await check_allowed(site.servers, tuple(site.pools), site.credentials(), site.regions)
        with suppress(FabricUnavailable):  # `inspect` has said so
            async with provisioner(site) as connection:
                found += compare(site, await behind.published(connection))
                found.append(compare_stores(site, await stores.read_mark(connection)))
        return found

    with waiting("checking the NATS servers"):
        found = asyncio.run(run())
    if as_json:
        say_json([asdict(finding) for finding in found])
    else:
        told = [(finding.verdict.value, finding.check, finding.detail, finding.remedy) for finding in found]
        say_table(("", "check", "found", "what to do"), told)
    if any(finding.verdict is Severity.WRONG for finding in found):
        raise typer.Exit(1)
