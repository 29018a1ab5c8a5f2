"""Makes an installed tree smaller, and the same each time: `slim.py FOLDER`, run by the Dockerfile's builders.

- Tests, headers, import libraries and caches go: nothing reads them at run time.
- Shared libraries that were installed under several names become one file and links to it.
- Bytecode is compiled here, for the image is read-only, and is bound to nothing that changes: no time stamp is looked at.
"""

from __future__ import annotations

import compileall
import hashlib
import shutil
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

UNUSED_FOLDERS = ("__pycache__", "tests", "test", "include", "cmake", "pkgconfig")
UNUSED_FILES = ("*.pyi", "*.pyx", "*.pxd", "*.h", "*.hpp", "*.a", "*.whl", "libllama-common.so*")  # the last is for programs


def slim(folder: Path) -> None:
    for packages in sorted(folder.rglob("site-packages")):
        _remove_unused(packages)
        _link_duplicates(packages)
        compileall.compile_dir(packages, quiet=1, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH, stripdir=str(folder))


def _remove_unused(packages: Path) -> None:
    for name in UNUSED_FOLDERS:
        for found in sorted(packages.rglob(name)):
            if found.is_dir():
                shutil.rmtree(found)
    for pattern in UNUSED_FILES:
        for found in packages.rglob(pattern):
            found.unlink()


def _link_duplicates(packages: Path) -> None:
    """Within one folder; the longest name, which has the whole version, stays a file."""
    kept: dict[tuple[Path, str], Path] = {}
    for library in sorted(packages.rglob("*.so*"), key=lambda path: (-len(path.name), path)):
        if library.is_symlink() or not library.is_file():
            continue
        key = (library.parent, hashlib.sha256(library.read_bytes()).hexdigest())
        if key in kept:
            library.unlink()
            library.symlink_to(kept[key].name)
        else:
            kept[key] = library


if __name__ == "__main__":
    slim(Path(sys.argv[1]))
