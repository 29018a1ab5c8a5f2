"""`make fuzz`: every target in turn, two at a time, and how many inputs each has tried. Fails with what it found.

    python -m fuzz [--seconds N] [--targets A,B]     search, N seconds in all
    python -m fuzz --replay FILE --targets TARGET    one input again, with its traceback

The search keeps what it learned in `build/fuzz`, outside the committed corpus. An input that breaks an invariant is written
there too; once mended, it belongs into `corpus/TARGET/found-…`, where `make test` replays it.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.seeds import CORPUS
from fuzz.targets import TARGETS

BUILD: Final = Path(__file__).resolve().parents[2] / "build" / "fuzz"
WORDS: Final = Path(__file__).parent / "json.dict"
AT_ONCE: Final = 2
START: Final = 2.5  # seconds until a search has imported what it needs
RSS_LIMIT: Final = 512  # MiB for a whole process; an idle one has some 150
INPUT_TIMEOUT: Final = 10  # seconds for one input
GRACE: Final = 60  # seconds beyond its time that a search may take to start, and to stop


@dataclass(frozen=True, slots=True)
class Result:
    """What one search came to. artifacts: the inputs that broke an invariant. output: what the fuzzer said."""

    target: str
    inputs: int
    seconds: float
    failed: bool
    artifacts: tuple[Path, ...]
    output: str


def search(name: str, seconds: int) -> Result:
    """Seconds is what the fuzzer itself may take."""
    learned, found = BUILD / "learned" / name, BUILD / "found" / name
    for folder in (learned, found):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    command = [
        sys.executable, "-m", "fuzz.search", name, learned, CORPUS / name,
        f"-max_total_time={seconds}", f"-max_len={TARGETS[name].max_length}", f"-rss_limit_mb={RSS_LIMIT}",
        f"-timeout={INPUT_TIMEOUT}", f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    if TARGETS[name].json:
        command.append(f"-dict={WORDS}")
    began = time.monotonic()
    try:
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + GRACE, check=False
        )
        said, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as exc:
        said, failed = (exc.output or b"") + b"\nit did not stop in time", True
    output = said.decode(errors="replace")
    counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", output) or re.findall(r"^#(\d+)\s", output, re.MULTILINE)
    inputs = int(counted[-1]) if counted else 0
    artifacts = tuple(sorted(set(found.iterdir()) - before))
    return Result(name, inputs, time.monotonic() - began, failed or inputs == 0, artifacts, output)


def report(results: Sequence[Result]) -> int:
    """Prints what came of every search; the exit code."""
    failed = [result for result in results if result.failed]
    for result in results:
        print(f"{result.target:20} {result.inputs:>10,} inputs {result.seconds:6.1f} s  {'FAILED' if result.failed else 'ok'}")
    total = sum(result.inputs for result in results)
    print(f"{'total':20} {total:>10,} inputs; {len(failed)} of {len(results)} targets failed")
    for result in failed:
        print(f"\n{result.target}: the end of what the fuzzer said\n" + "\n".join(result.output.splitlines()[-30:]))
        for path in result.artifacts:
            print(f"reproducer: {path}\n  hex: {path.read_bytes().hex()}")
            print(f"  again: PYTHONPATH=tests {sys.executable} -m fuzz --targets {result.target} --replay {path}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="wall-clock time for all targets together")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of them, with commas between")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input through the target, without a fuzzer")
    arguments = parser.parse_args()
    names = arguments.targets.split(",")
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if arguments.replay:
        TARGETS[names[0]].check_memory(arguments.replay.read_bytes())
        print(f"{names[0]} takes {arguments.replay} as it should")
        return 0
    rounds = math.ceil(len(names) / AT_ONCE)
    each = max(1, round(arguments.seconds / rounds - START))
    print(f"{len(names)} targets, {AT_ONCE} at a time, {each} s each", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return report(list(pool.map(lambda name: search(name, each), names)))


if __name__ == "__main__":
    sys.exit(main())
