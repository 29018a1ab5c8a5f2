"""`python -m lacre_backend --settings FILE` is `lacre worker`."""

from __future__ import annotations

import sys

from lacre.errors import LacreError
from lacre_backend.commands import commands

if __name__ == "__main__":
    try:
        commands()
    except LacreError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201 - the one line that says why it does not run
        sys.exit(1)
