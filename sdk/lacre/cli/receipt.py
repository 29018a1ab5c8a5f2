"""`lacre receipt check`: who signed a kept receipt, by the deployment's manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lacre.cli.output import AsJson, Url, date, printable, say, say_json, waiting
from lacre.cli.surroundings import read_file, utf8
from lacre.client import fetch_manifest
from lacre.errors import SettingsError
from lacre.evidence import kept_receipts
from lacre.jose.jws import b64u

MAX_RECEIPT = 64 * 1024  # bytes; a receipt has under 1 KiB
receipt_app = typer.Typer(name="receipt", help="Receipts of answers that were kept.", no_args_is_help=True)


@receipt_app.command("check")
def receipt_check(
    receipt: Annotated[Path, typer.Argument(help="It holds `reply.receipt.text()`, or `receipt` of `lacre ask --json`.")],
    pool: Annotated[str | None, typer.Option(help="It must be of this pool. Default: any.", metavar="NAME")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the manifest, and tell which pool signed a kept receipt, also if its key was replaced since."""
    text = utf8(read_file(receipt, MAX_RECEIPT), str(receipt)).strip()
    if text.count(".") != 2:
        raise SettingsError(f"{receipt} holds no receipt: name a file with `reply.receipt.text()` alone")
    with waiting("fetching the manifest"):
        manifest = fetch_manifest(url)
    found = kept_receipts.check(text, manifest, pool)
    told = found.receipt
    if as_json:
        say_json(
            {"ok": True, "pool": found.pool, "key": b64u(found.key), "until": found.until, "receipt": told.members()}, indent=2
        )
        return
    key = "its present key" if found.until is None else f"a key that it used until {date(found.until)}"
    say(printable(f"the pool {found.pool} signed this with {key}:"))
    say(f"{told.prompt_tokens} prompt tokens ({told.cached_tokens} cached), {told.completion_tokens} completion tokens")
    if not told.final:
        say("it is not the final receipt of its request")
    say(printable(f"model {told.model or 'without a digest'}, from {date(told.start)} to {date(told.end)}"))
    say(printable(f"request {told.enc}"))
