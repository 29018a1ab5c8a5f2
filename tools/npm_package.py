"""Makes `dist/lacre-VERSION.tgz`, the npm package: its types are written by tsc, and its version is this tree's.

Nothing is published. `node` and `npm` must be installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCE: Final = ROOT / "sdk" / "javascript"
SHIPPED: Final = ("src", "types", "importmap.json", "README.md", "package.json")


def packed(destination: Path) -> Path:
    """The package's file in this folder. The dependencies of `sdk/javascript` must be installed there."""
    _run("npx", "--no-install", "tsc", folder=SOURCE)
    staged = ROOT / "build" / "npm"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name in SHIPPED:
        copy = shutil.copytree if (SOURCE / name).is_dir() else shutil.copy
        copy(SOURCE / name, staged / name)
    shutil.copy(ROOT / "LICENSE", staged)
    manifest = json.loads((staged / "package.json").read_text())
    manifest["version"] = version()
    (staged / "package.json").write_text(json.dumps(manifest, indent=2) + "\n")
    destination.mkdir(parents=True, exist_ok=True)
    name = _run("npm", "pack", "--silent", "--pack-destination", str(destination), folder=staged).split()[-1]
    return destination / name


def version() -> str:
    """Of the whole tree, as `sdk/lacre/_version.py` has it."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "sdk" / "lacre" / "_version.py").read_text())
    if found is None:
        raise SystemExit("sdk/lacre/_version.py has no __version__")
    return found[1]


def _run(program: str, *args: str, folder: Path) -> str:
    path = shutil.which(program)
    if path is None:
        raise SystemExit(f"{program} is not installed: install Node 20 or newer, which brings npm")
    done = subprocess.run([path, *args], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} {args[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    _run("npm", "ci", folder=SOURCE)
    sys.stdout.write(f"{packed(ROOT / 'dist')}\n")
