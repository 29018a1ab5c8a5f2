"""`lacre manifest show` and `route`: the signed description of pools, models and keys, and the way of a request."""

from __future__ import annotations

from typing import Annotated

import typer

from lacre.cli.output import AsJson, Url, date, printable, say, say_json, say_table, waiting
from lacre.client import fetch_manifest
from lacre.client.settings import memory_of
from lacre.errors import SettingsError
from lacre.exchange.routing import DEFAULT_POOL, models_of
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import sticky_key
from lacre.trust.routes import ModelRoute, RouteTarget, sticky_seed

manifest_app = typer.Typer(name="manifest", help="The signed description of pools, models and keys.", no_args_is_help=True)


@manifest_app.command("show")
def manifest_show(url: Url = None, as_json: AsJson = False) -> None:
    """Fetch the manifest, verify it against the pinned root, and print it."""
    with waiting("fetching the manifest"):
        manifest = fetch_manifest(url)
    if as_json:
        say_json(manifest.members(), indent=2)
        return
    say(printable(f"{manifest.issuer}, version {manifest.version}, valid until {date(manifest.expires_at)}"))
    rows: list[tuple[str, ...]] = []
    for name, pool in manifest.pools.items():
        for key in pool.keys:
            row = (name, ", ".join(pool.models), str(key.config.key_id), key.config.kem.label, date(key.not_after))
            rows.append((*row, ", ".join(pool.shapes)))
    say_table(("pool", "models", "key", "KEM", "seal until", "shapes"), rows)
    if manifest.routes:
        say_table(("route", "pools"), [(name, _told(route)) for name, route in manifest.routes.items()])


@manifest_app.command("route")
def manifest_route(
    model: Annotated[str, typer.Argument(help="The model's name, as a request has it.")],
    scope: Annotated[
        str | None, typer.Option(help="The user of a program, as in `cache_scope`. Default: no one.", metavar="NAME")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the manifest, and print the pools that a request for this model goes to, from this machine and this user."""
    with waiting("fetching the manifest"):
        manifest = fetch_manifest(url)
    route = _route(manifest, model)
    ordered = route.ordered(sticky_seed(sticky_key(memory_of(None)), model, scope)) if route.sticky else route.targets
    rows = [(target, route.portion(target)) for target in ordered]
    if as_json:
        pools = [{**target.members(), "portion": portion} for target, portion in rows]
        say_json({"model": model, "sticky": route.sticky, "pools": pools}, indent=2)
        return
    told = [(_when(route, number, share), to.pool, to.model, f"{share:.4%}") for number, (to, share) in enumerate(rows)]
    say_table(("", "pool", "model", "share"), told)


def _when(route: ModelRoute, number: int, portion: float) -> str:
    if not route.sticky:
        return "drawn for each call" if portion else "stands by"
    return "if those above have no worker" if number else "first"


def _route(manifest: Manifest, model: str) -> ModelRoute:
    """The route of this name; for another model, the pool of a caller who chose none. Raises SettingsError."""
    if (route := manifest.routes.get(model)) is not None:
        return route
    if model not in (known := models_of(manifest, None)):
        raise SettingsError(f"there is no route or model {model!r}: there are {', '.join(known) or 'none'}")
    return ModelRoute((RouteTarget(DEFAULT_POOL, model),))


def _told(route: ModelRoute) -> str:
    told = ", ".join(f"{target.pool}/{target.model} {route.portion(target):.4g}" for target in route.targets)
    return f"{told}; {'sticky' if route.sticky else 'each call draws'}"
