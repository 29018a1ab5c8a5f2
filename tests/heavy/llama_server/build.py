"""Compiles `llama-server` out of llama-cpp-python's source archive: once for this lock, kept outside the clone.

The computing is that of the wheel's libraries. So the server itself is compiled without optimizing: 4 minutes of CPU time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import llama_cpp

HERE: Final = Path(__file__).parent
LIBRARIES: Final = Path(llama_cpp.__file__).parent / "lib"
SOURCE: Final = "vendor/llama.cpp/"  # in the archive, below its own folder
DEFINED: Final = (f"-DLIBRARIES={LIBRARIES}", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", "-DLLAMA_OPENSSL=OFF")


def llama_server(archive: Path) -> Path:
    recipe = (HERE / "CMakeLists.txt").read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(archive.read_bytes() + recipe).hexdigest()[:16]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache_home / "lacre" / "llama-server" / key / "llama-server"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=kept.parent.parent) as folder:
            _built(archive, Path(folder)).replace(kept)  # at once: another process never sees half a file
    return kept


def _built(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, members=_of_llama_cpp(packed), filter="data")
    source = folder / SOURCE
    shutil.copy(HERE / "CMakeLists.txt", source)
    cmake, ninja = (Path(sys.executable).with_name(name) for name in ("cmake", "ninja"))
    build = folder / "build"
    for command in (
        [cmake, "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *DEFINED],
        [cmake, "--build", build, "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
    return build / "bin/llama-server"


def _of_llama_cpp(packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in packed:
        member.name = member.name.partition("/")[2]
        if member.name.startswith(SOURCE):
            yield member
