"""`lacre worker`."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the command, where what it needs is installed."""
    if find_spec("nats") is not None and find_spec("llama_cpp") is not None and find_spec("pydantic") is not None:
        app.command()(worker)


def worker(settings: Annotated[Path, typer.Option(help="The worker's settings file (TOML).")]) -> None:
    """Run a worker: it dials out to the fabric, opens sealed requests and answers them with its models."""
    from lacre_backend.settings import load
    from lacre_backend.worker import serve
    from lacre_fabric.logs import last_words

    with last_words():
        asyncio.run(serve(load(settings)))
