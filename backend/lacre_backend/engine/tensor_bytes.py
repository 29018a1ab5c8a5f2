"""How many bytes a tensor takes in a file, by ggml's own table of types."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp as L
from llama_cpp.llama_cpp import _lib as _llama

from lacre.errors import SettingsError
from lacre_backend.engine.gguf_header import Tensor


def tensor_bytes(path: Path, tensor: Tensor) -> int:
    """path: for messages. Raises SettingsError if its type is unknown, or its rows are no whole blocks."""
    if not 0 <= tensor.kind < L.GGML_TYPE_COUNT or not (block := int(_llama.ggml_blck_size(tensor.kind))):
        raise SettingsError(
            f"{path}: the tensor {tensor.name[:64]!r} has the unknown type {tensor.kind}. Convert the model again."
        )
    if tensor.shape[0] % block:
        raise SettingsError(f"{path}: a row of {tensor.name[:64]!r} is no whole number of blocks. Copy the file again.")
    _llama.ggml_type_size.restype = ctypes.c_size_t
    return tensor.elements // block * int(_llama.ggml_type_size(tensor.kind))
