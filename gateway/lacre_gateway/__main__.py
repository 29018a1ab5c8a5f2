"""`python -m lacre_gateway --settings FILE` is `lacre gateway`."""

from __future__ import annotations

import typer

from lacre.cli.ending import run
from lacre_gateway.commands import gateway

if __name__ == "__main__":
    run(lambda: typer.run(gateway))
