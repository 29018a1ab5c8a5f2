"""A file system that is small enough to fill: a tmpfs, which takes root to mount."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _mount(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _why_not() -> str | None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting a small disk takes root"
    with tempfile.TemporaryDirectory() as folder:
        if not _mount(Path(folder), "100k"):
            return "this machine mounts no tmpfs"
        _unmount(Path(folder))
    return None


NO_DISK = _why_not()  # why there can be none here


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """size: as `mount` takes it, such as 400k."""
    folder.mkdir()
    assert _mount(folder, size)
    try:
        yield folder
    finally:
        _unmount(folder)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """To the last byte, while the body runs."""
    ballast = disk / "ballast"
    handle = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(handle, bytes(4096))
    except OSError as exc:
        assert exc.errno == errno.ENOSPC
    finally:
        os.close(handle)
    try:
        yield
    finally:
        ballast.unlink()
