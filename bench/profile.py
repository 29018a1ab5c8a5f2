"""`make profile`: draws where one gateway process spends its time under the load of `bench/gateway.py`, by py-spy.

The flame graph goes to build/profile.svg, the functions with most samples to the terminal. Samples without the interpreter's
lock do not count: a thread that waits for the disk costs no CPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.stand import ROOT, run_load, stand

SECONDS, RATE, SHOWN = 15, 500, 40
TOOL = Path(sys.executable).with_name("py-spy")


def profile(records: int) -> None:
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, stand(Path(name)) as served, served.answering(records):
        run_load(served.load(2**10, 16, seconds=1.0))
        options = ["--pid", str(served.process.pid), "--duration", str(SECONDS), "--rate", str(RATE), "--gil"]
        sampling = [
            subprocess.Popen([TOOL, "record", *options, "--format", kind, "--output", build / f"profile.{end}"])
            for kind, end in (("flamegraph", "svg"), ("raw", "txt"))
        ]
        print(run_load(served.load(2**10, 16, seconds=SECONDS + 1.0)))
        for process in sampling:
            process.wait()
    _print_hot(build / "profile.txt")


def _print_hot(raw: Path) -> None:
    """raw: a line a stack, its frames with semicolons between them, and how often it was seen."""
    within: Counter[str] = Counter()
    itself: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] + ")" if ":" in frame else frame for frame in stack.split(";")]
        itself[frames[-1]] += int(count)
        within.update(dict.fromkeys(frames, int(count)))
    total = sum(itself.values())
    for title, counts in (("itself", itself), ("with what it calls", within)):
        print(f"{title}:")
        for frame, count in counts.most_common(SHOWN):
            print(f"  {count / total:6.1%}  {frame}")


if __name__ == "__main__":
    profile(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
