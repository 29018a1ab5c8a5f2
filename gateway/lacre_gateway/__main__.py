"""`python -m lacre_gateway --settings FILE` is `lacre gateway`."""

from __future__ import annotations

import sys

import typer

from lacre.errors import LacreError
from lacre_gateway.commands import gateway

if __name__ == "__main__":
    try:
        typer.run(gateway)
    except LacreError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201 - the one line that says why it does not run
        sys.exit(1)
