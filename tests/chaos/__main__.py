"""`make chaos CHAOS_SECONDS=600 CHAOS_SEED=7`: strikes a whole deployment for so long, and says what did not hold.

The seed makes the schedule and the load; it is printed, and the same one strikes the same way again. Exits with 1 where
something did not hold; what the run left is then kept.
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

from chaos import report
from chaos.run import run
from chaos.schedule import draw


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
        report.record(result)
    if result.wrong:
        print(f"{result.wrong} violations; what the run left is in {folder}")
        return 1
    shutil.rmtree(folder)
    print("no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
