"""A command's output file: written as a draft beside its place, and renamed when it is whole. A failure leaves nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lacre.errors import SettingsError
from lacre.runtime.private_files import sync_folder
from lacre_backend.engine.shards import check_name


@contextmanager
def draft(out: Path, sources: Sequence[Path], *, size: int = 0) -> Iterator[Path]:
    """Where to write. When the block ends without an error, the draft replaces what is at `out`.

    sources: files that the work reads; `out` may not be one of them. size: bytes that the output will take, if known.
    Raises SettingsError before anything is written, and OSError.
    """
    check_name(out)
    for source in sources:
        if out.exists() and out.samefile(source):
            raise SettingsError(f"{out} is the input itself. Give another file with --out; nothing was changed.")
    if out.is_dir():
        raise SettingsError(f"{out} is a folder. Give the path of a file with --out.")
    if out.exists() and not out.is_file():  # the draft would replace the device itself
        raise SettingsError(f"{out} is a pipe or a device. Give the path of a file with --out.")
    folder = out.parent
    if not folder.is_dir():
        raise SettingsError(f"The folder {folder} does not exist. Make it, or give another --out.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"The folder {folder} cannot be written. Give another --out, or correct its permissions.")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SettingsError(
            f"{folder} has {free / 2**20:,.0f} MiB free, and the output takes {size / 2**20:,.0f} MiB. "
            "Make room, or give another --out."
        )
    path = folder / f".{out.name}.{os.getpid()}.draft"
    try:
        yield path
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.replace(out)
    except OSError as exc:
        exc.filename = exc.filename or str(out)  # a write does not know where
        raise
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
    sync_folder(folder)
