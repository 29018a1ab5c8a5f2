"""What `import lacre` costs over `import httpx2`, best of several fresh interpreters, taken in turns. Goal: at most 100 ms."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, float]:
    """Milliseconds."""
    peer, ours = [], []
    for _ in range(rounds):
        peer.append(seconds("import httpx2"))
        ours.append(seconds("import lacre"))
    return {"import_httpx2_ms": min(peer) * 1e3, "import_lacre_ms": min(ours) * 1e3, "added_ms": (min(ours) - min(peer)) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    figures = {name: round(value, 1) for name, value in measure(5 if arguments.quick else 20).items()}
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
