"""Takes one defence away at a time, and sees which attack notices: `make mutants`.

Each mutation changes one statement of the product in a copy of the tree, and names the one test that must fail for it. If no
test notices, nobody would miss that defence.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hostile.defences import fabric, gateway, sdk, wire, worker
from hostile.mutation import ROOMS, Mutation
from hostile.warm import Warm

ROOT: Final = Path(__file__).resolve().parent.parent.parent
COPIED: Final = (*ROOMS, "policies", "tests/hostile", "tests/parts", "tests/conftest.py", "pyproject.toml")
MUTATIONS: Final = (*wire.MUTATIONS, *sdk.MUTATIONS, *worker.MUTATIONS, *fabric.MUTATIONS, *gateway.MUTATIONS)


@contextmanager
def copy() -> Iterator[Path]:
    """The tree, as far as the tests need it, in a place of its own."""
    with tempfile.TemporaryDirectory(prefix="lacre-mutants-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(folder)


def survivor(warm: Warm, tree: Path, mutation: Mutation) -> str:
    """What the mutation's test said if it did not fail on it; empty if it did. A test that was not even run proves nothing."""
    path = mutation.path(tree)
    good, times = path.read_text(), path.stat()
    path.write_text(mutation.applied(good))
    try:
        status, said = warm.run(f"tests/hostile/{mutation.test}")
        if status == -signal.SIGKILL:  # it hung, which says nothing of the defence
            status, said = warm.run(f"tests/hostile/{mutation.test}")
    finally:
        path.write_text(good)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    failed = (f"FAILED tests/hostile/{mutation.test}", "plaintext left the process")
    caught = status == 1 and any(sign in said for sign in failed)
    return "" if caught else f"nothing failed: pytest ended with {status}\n{said[-4000:]}"


def main() -> int:
    """Prints the table; the status says whether every mutation was caught."""
    survivors = 0
    with copy() as tree, Warm.of(tree, ROOMS) as warm:
        status, said = warm.run(*sorted({f"tests/hostile/{mutation.test}" for mutation in MUTATIONS}), patience=1800)
        if status != 0:
            print(said[-2000:], "the tests fail before anything was changed", sep="\n")
            return 1
        print("| defence taken away | in | caught by | seconds |\n|---|---|---|---|")
        for mutation in MUTATIONS:
            began = time.monotonic()
            found = not survivor(warm, tree, mutation)
            survivors += not found
            verdict = f"`{mutation.test}`" if found else "**nothing**"
            print(f"| {mutation.defence} | `{mutation.place}` | {verdict} | {time.monotonic() - began:.1f} |", flush=True)
    print(f"\n{len(MUTATIONS) - survivors} of {len(MUTATIONS)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
