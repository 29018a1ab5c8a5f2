"""The table of runs in `docs/reliability.md`: a row for each, in the order they were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from chaos.findings import Result

DOCUMENT: Final = Path(__file__).parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- from here on written by `make chaos CHAOS_RECORD=1` -->\n", "<!-- to here -->\n"
HEAD: Final = (
    "| seed | seconds | requests | whole | cancelled | typed errors | resumed | strikes | outage | wait | violations |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def row(result: Result) -> str:
    ended, whole, cancelled = sum(result.ended.values()), result.ended.get("whole", 0), result.ended.get("cancelled", 0)
    errors = ", ".join(f"{count} {name}" for name, count in result.errors.items()) or "none"
    strikes = f"{sum(result.strikes.values())}, of {len(result.strikes)} kinds"
    return (
        f"| {result.seed} | {result.seconds:.0f} | {ended} | {whole} | {cancelled} "
        f"| {errors} | {result.resumed} | {strikes} | {result.outage} s | {result.wait} s | {result.wrong} |\n"
    )


def with_row(document: str, result: Result) -> str:
    """A run of the same seed and length is replaced."""
    before, _, rest = document.partition(BEGIN)
    table, _, after = rest.partition(END)
    place = f"| {result.seed} | {result.seconds:.0f} |"
    rows = [line for line in table.splitlines(keepends=True) if line.startswith("| ") and line[2].isdigit()]
    rows = [line for line in rows if not line.startswith(place)]
    return f"{before}{BEGIN}\n{HEAD}{''.join(rows)}{row(result)}\n{END}{after}"


def record(result: Result) -> None:
    DOCUMENT.write_text(with_row(DOCUMENT.read_text(), result))
