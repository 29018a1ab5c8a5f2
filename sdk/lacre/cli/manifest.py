"""`lacre manifest show`: the signed description of pools, models and keys."""

from __future__ import annotations

import typer

from lacre.cli.output import AsJson, Url, date, error_as_json, printable, say, say_json, say_table, waiting
from lacre.client import fetch_manifest

manifest_app = typer.Typer(name="manifest", help="The signed description of pools, models and keys.", no_args_is_help=True)


@manifest_app.command("show")
def manifest_show(url: Url = None, as_json: AsJson = False) -> None:
    """Fetch the manifest, verify it against the pinned root, and print it."""
    with error_as_json(as_json), waiting("fetching the manifest"):
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
