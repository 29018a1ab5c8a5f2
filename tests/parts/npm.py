"""The npm packages that a folder's lock file pins, for tests that run Node."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path


def install(folder: Path) -> None:
    """Runs `npm ci` there unless that was done for this very lock file. Others wait for the one process that does it."""
    lock = folder / "package-lock.json"
    stamp, wanted = folder / "node_modules" / ".installed", sha256(lock.read_bytes()).hexdigest()
    with lock.open("rb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        done = subprocess.run([str(shutil.which("npm")), "ci"], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        stamp.write_text(wanted)
