"""Time that `import lacre` adds to `import httpx2`, best of several fresh interpreters, in turns. Goal: at most 100 ms."""

from __future__ import annotations

import subprocess
import sys
import time

from bench import command


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def measure(quick: bool) -> command.Figures:
    """Milliseconds."""
    peer, ours = [], []
    for _ in range(5 if quick else 20):
        peer.append(seconds("import httpx2"))
        ours.append(seconds("import lacre"))
    figures = {"import_httpx2_ms": min(peer), "import_lacre_ms": min(ours), "added_ms": min(ours) - min(peer)}
    return {name: round(value * 1e3, 1) for name, value in figures.items()}


if __name__ == "__main__":
    command.run(__doc__, {"imports": measure})
