"""Rewrites a model's weights by `llama_model_quantize`: to another type, or with fewer layers.

Rules:
- It runs in a child alone, because llama.cpp ends the process on some inputs. It writes where `draft` says, never in place.
- llama.cpp's log tells the tensors that are done, and its errors. Nothing in it is of a prompt.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import llama_cpp as L
import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.graph import Values
from lacre_backend.engine.model import silence
from lacre_backend.models import checksum

COPY: Final = "COPY"  # llama.cpp's word for the types that the tensors have: a split model becomes one file
_PREFIX: Final = "LLAMA_FTYPE_"
_NO_TYPES: Final = frozenset({"GUESSED", "NVFP4"})  # no type, and one that llama.cpp only reads
# What llama.cpp's own tool refuses without a matrix, because the answers become useless; and IQ3_XXS, as bad here.
NEED_MATRIX: Final = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XS", "IQ3_XXS", "Q2_K_S"})
_PROGRESS: Final = re.compile(r"\[ *([0-9]+)/ *([0-9]+)\]")
_FULL: Final = 2**20  # bytes: less free space than this, and the disk was full
_ERROR: Final = 4  # llama.cpp's level


def type_numbers() -> dict[str, int]:
    """llama.cpp's types of files by name, such as `Q4_K_M`."""
    named = {
        name.removeprefix(_PREFIX).removeprefix("MOSTLY_").removeprefix("ALL_"): value
        for name, value in vars(L).items()
        if name.startswith(_PREFIX) and isinstance(value, int)
    }
    return {name: value for name, value in sorted(named.items()) if name not in _NO_TYPES}


def known_type(name: str) -> str:
    """Its name as llama.cpp writes it. Raises SettingsError."""
    types = type_numbers()
    if name.upper() == COPY:
        return COPY
    if name.upper() not in types:
        raise SettingsError(f"There is no type {name!r}. Give one of: {', '.join(types)}; or {COPY}.")
    return name.upper()


@dataclass(frozen=True, slots=True)
class Rewriting:
    """type: None or `COPY`: every tensor keeps its own. matrix: the importance of the columns, by tensor.

    without: layers left out.
    """

    type: str | None
    matrix: Mapping[str, Values] = field(default_factory=lambda: MappingProxyType({}))
    without: Sequence[int] = ()


def rewrite(source: Path, out: Path, wanted: Rewriting, report: Callable[[float], None]) -> None:
    """Writes `out`. report: is told the share that is done. Raises SettingsError with llama.cpp's reason."""
    params = L.llama_model_quantize_default_params()
    params.nthread = len(os.sched_getaffinity(0))
    params.allow_requantize = True  # the caller has asked already
    params.only_copy = wanted.type in (None, COPY)
    if wanted.type is not None and wanted.type != COPY:
        params.ftype = type_numbers()[wanted.type]
    kept = _matrix(wanted.matrix)  # llama.cpp reads them during the call
    if wanted.matrix:
        params.imatrix = kept[0]
    layers = (ctypes.c_int32 * (len(wanted.without) + 1))(*sorted(wanted.without), -1)
    if wanted.without:
        params.prune_layers = layers
    errors: deque[str] = deque(maxlen=4)

    @L.llama_log_callback  # type: ignore[untyped-decorator]
    def heard(level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == _ERROR and line:
            errors.append(line)
        elif (found := _PROGRESS.match(line)) is not None:
            report(int(found[1]) / int(found[2]))

    L.llama_log_set(heard, ctypes.c_void_p(0))
    try:
        code = L.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    finally:
        silence()
    if code != 0:
        raise SettingsError(_reason(source, out, list(errors)))
    checksum.write(out)


def _matrix(matrix: Mapping[str, Values]) -> tuple[Any, list[Values]]:
    """For llama.cpp, and the arrays that it points into. The last entry is empty."""
    arrays = [np.ascontiguousarray(values, np.float32) for values in matrix.values()]
    entries = (L.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, name, array in zip(entries, matrix, arrays, strict=False):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, arrays


_IO: Final = "iostream error"  # C++'s own words, if a write fails


def _reason(source: Path, out: Path, errors: list[str]) -> str:
    if shutil.disk_usage(out.parent).free < _FULL:
        return f"The disk of {out.parent} is full. Make room, or give another --out; nothing was written."
    words = "; ".join(errors)[-300:] or "it gives no reason"
    if _IO in words:
        return f"{out.parent} takes no file of this size ({words}). Check quotas and `ulimit -f`; nothing was written."
    return f"llama.cpp cannot write this from {source}: {words}. Give another type, or another model; nothing was written."
