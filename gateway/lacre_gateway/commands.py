"""`lacre gateway`, `lacre audit` and `lacre policy`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lacre_gateway.audit import commands as audit
from lacre_gateway.policy import commands as policy


def register(app: typer.Typer) -> None:
    """Adds `lacre audit`, and the others where what they need is installed."""
    audit.register(app)
    if find_spec("cedarpy") is not None:
        policy.register(app)
    if find_spec("nats") is not None and find_spec("fastapi") is not None and find_spec("cedarpy") is not None:
        app.command()(gateway)


def gateway(settings: Annotated[Path, typer.Option(help="The gateway's settings file (TOML).")]) -> None:
    """Run a gateway: it authenticates, decides, records and routes sealed requests, and can read none of them."""
    from lacre_fabric.logs import last_words
    from lacre_gateway.server import serve
    from lacre_gateway.settings import load

    with last_words():
        serve(load(settings))
