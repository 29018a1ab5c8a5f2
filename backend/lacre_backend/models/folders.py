"""The digests of a folder with a model, as OpenSSF Model Signing takes them: of each file, by its path in the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.models.gguf import FileDigests

MAX_FILES: Final = 10_000  # of a folder; checkpoints have some hundred
# What is no part of a model: left by git, and by downloads from Hugging Face.
IGNORED: Final = (".cache", ".git", ".gitattributes", ".github", ".gitignore")


def read(folder: Path, ignored: Iterable[str] = IGNORED) -> FileDigests:
    """Reads every file once. ignored: paths in the folder, each with all below it. The model's digest is that of the digests.

    Raises SettingsError for a link, because its target could be anywhere, or OSError.
    """
    left_out = {PurePosixPath(path) for path in ignored}
    each: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        inside = PurePosixPath(path.relative_to(folder).as_posix())
        if left_out & {inside, *inside.parents}:
            continue
        if path.is_symlink():
            raise SettingsError(f"{path} is a link, and links are not signed. Copy the folder with `cp -rL`, and use the copy.")
        if path.is_file():
            with path.open("rb") as file:
                each[str(inside)] = hashlib.file_digest(file, "sha256").hexdigest()
        if len(each) > MAX_FILES:
            raise SettingsError(f"{folder} has more than {MAX_FILES:,} files, so it is no model. Check the path.")
    if not each:
        raise SettingsError(f"{folder} has no files. Check the path.")
    whole = hashlib.sha256(b"".join(bytes.fromhex(each[name]) for name in sorted(each, key=PurePosixPath)))
    return FileDigests(each, whole.hexdigest())
