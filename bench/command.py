"""The command line of every benchmark: `--quick`, `--json FILE`, and the printing of figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

Figures = dict[str, float]
Measure = Callable[[bool], Figures]


def machine() -> str:
    """What a figure cannot be compared without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def run(description: str | None, benchmarks: Mapping[str, Measure]) -> None:
    """Measures, prints, and writes to `--json FILE`: one benchmark's figures, or all by the benchmark's name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under 50 s in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    print(machine())
    results = {}
    for name, measure in benchmarks.items():
        results[name] = measure(arguments.quick)
        print(f"{name}:")
        for key, value in results[name].items():
            print(f"  {key:36} {value:>10}")
    if arguments.json:
        (only, *others) = results.values()
        arguments.json.write_text(json.dumps(results if others else only, indent=1) + "\n")
