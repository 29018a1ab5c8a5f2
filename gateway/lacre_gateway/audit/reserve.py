"""Room on the disk that is held for the day it is full: for the start of a gateway, and for the record of an erasure.

Without it, a gateway could not erase old logs on a full disk, because it records each erasure first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

from lacre.runtime.private_files import sync_folder
from lacre_gateway.audit import tiles

NAME: Final = "reserve"
_SPARE: Final = 8  # times the reserve: on a fuller disk, it would take the room that the log needs next
_BYTES: Final = 128 * 1024  # some commits of some entries each, the tiles over them, and the remains of an erased log


def hold(root: Path) -> None:
    """Makes the file beside the first log, if there is room to spare and none yet. Raises OSError, but not for a full disk."""
    path, beside = root / NAME, root / f".{NAME}.new"
    if path.exists() or shutil.disk_usage(root).free < _SPARE * _BYTES:
        return
    handle = os.open(beside, tiles.FLAGS | os.O_TRUNC, 0o600)
    try:
        os.write(handle, os.urandom(_BYTES))  # a file system could store zeros in no space
        os.fsync(handle)
        whole = os.fstat(handle).st_size == _BYTES
    except OSError:
        whole = False
    finally:
        os.close(handle)
    beside.replace(path) if whole else beside.unlink()


def give_up(root: Path) -> bool:
    """Frees the room. Whether there was any. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        (root / NAME).unlink()
        sync_folder(root)
        return True
    return False
