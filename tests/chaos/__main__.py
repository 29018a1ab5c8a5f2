"""`make chaos CHAOS_SECONDS=600 CHAOS_SEED=7`: strikes a whole deployment for so long, and says what did not hold.

The seed makes the schedule and the load; it is printed, and the same one strikes the same way again. Exits with 1 where
something did not hold; what the run left is then kept. Recorded runs are a table of `docs/reliability.md`, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

from chaos.findings import Result
from chaos.run import run
from chaos.schedule import draw

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the load lasts")
    parser.add_argument("--seed", type=int, help="drawn where left out")
    parser.add_argument("--plan", action="store_true", help="print the schedule, and strike nothing")
    parser.add_argument("--record", action="store_true", help="write the result into docs/reliability.md")
    options = parser.parse_args()
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}, {options.seconds:.0f} s", flush=True)
    if options.plan:
        print(*draw(seed, options.seconds), sep="\n")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="lacre-chaos-"))
    result = asyncio.run(run(folder, seed, options.seconds))
    print(json.dumps(asdict(result), indent=1, ensure_ascii=False))
    for check, wrong in result.violations.items():
        for each in wrong:
            print(f"VIOLATION {check}: {each}")
    if options.record:
        record(result)
    if result.wrong:
        print(f"{result.wrong} violations; what the run left is in {folder}")
        return 1
    shutil.rmtree(folder)
    print("no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
