"""Prints the folder of the npm packages in tests/chart/kinds: the schemas of other projects' kinds. Fetches them if missing.

They are kept outside the clone (`$XDG_CACHE_HOME/lacre/kinds`), under the lock file's digest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "tests" / "chart" / "kinds"
FILES = ("package.json", "package-lock.json", ".npmrc")


def ready() -> Path:
    """The folder that has `node_modules`, made now where there is none."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_home / "lacre" / "kinds"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    with (folder / ".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two test runs do not fetch the same at a time
        if not kept.exists():
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as fetching:
                at = Path(fetching) / "kinds"
                at.mkdir()
                for name in FILES:
                    shutil.copy(HERE / name, at / name)
                subprocess.run(["npm", "ci", "--silent"], cwd=at, check=True, stdout=sys.stderr)
                at.replace(kept)  # the same file system: another run never sees half of it
    return kept


if __name__ == "__main__":
    try:
        print(ready())
    except (OSError, subprocess.CalledProcessError) as exc:
        raise SystemExit(f"The schemas of other projects cannot be fetched: {exc}") from None
