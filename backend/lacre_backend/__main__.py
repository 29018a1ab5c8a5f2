"""`python -m lacre_backend --settings FILE` is `lacre worker`."""

from __future__ import annotations

from lacre.cli.ending import run
from lacre_backend.commands import commands

if __name__ == "__main__":
    run(commands)
