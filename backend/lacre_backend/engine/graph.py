"""What llama.cpp computes on the way: the tensors of its graph, read and written while a step runs.

Rules:
- llama.cpp calls `Watcher` for each tensor of the graph. An error there is kept, and raised after the step.
- ggml has no function for a tensor's sources, so its struct is read. Its size is compared with ggml's own first.
- A watched context computes more slowly, so only contexts of their own are watched, never the one that serves streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import llama_cpp as L
import numpy as np
from llama_cpp.llama_cpp import _lib as _llama
from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback
from numpy.typing import NDArray

from lacre.errors import LacreError, SettingsError

Values = NDArray[np.float32]

_OBJECT: Final = 32  # bytes that ggml puts before a tensor's struct
_READABLE: Final = {L.GGML_TYPE_F32: np.float32, L.GGML_TYPE_F16: np.float16}


class _Struct(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class GraphTensor:
    """A tensor of the graph. It is valid during the callback alone."""

    __slots__ = ("_place", "_struct")

    def __init__(self, place: int) -> None:
        self._place = place
        self._struct = _Struct.from_address(place)

    @property
    def name(self) -> str:
        return bytes(self._struct.name).decode("utf-8", "replace")

    @property
    def operation(self) -> str:
        return bytes(_llama.ggml_op_name(self._struct.op)).decode()

    def source(self, number: int) -> GraphTensor | None:
        place = self._struct.src[number]
        return GraphTensor(place) if place else None

    def rows(self) -> Values:
        """A copy, with one row for each token. Raises SettingsError for a type that activations do not have."""
        kind = _READABLE.get(self._struct.type)
        if kind is None:
            raise SettingsError(f"The activation {self.name[:64]!r} has the unreadable type {self._struct.type}.")
        size = int(_llama.ggml_nbytes(self._place))
        raw = np.empty(size, np.uint8)
        _llama.ggml_backend_tensor_get(self._place, raw.ctypes.data, 0, size)
        shape, strides = tuple(self._struct.ne)[::-1], tuple(self._struct.nb)[::-1]
        values = np.lib.stride_tricks.as_strided(raw.view(kind), shape, strides)
        return values.reshape(-1, shape[-1]).astype(np.float32)

    def overwrite(self, values: Values) -> bool:
        """Replaces all of it before anything reads it. False, and nothing is written, if the values do not fit exactly."""
        columns, rows, *others = tuple(self._struct.ne)
        fits = (rows, columns) == values.shape and others == [1, 1] and self._struct.type == L.GGML_TYPE_F32
        whole = np.ascontiguousarray(values)
        if not fits or int(_llama.ggml_nbytes(self._place)) != whole.nbytes:
            return False
        _llama.ggml_backend_tensor_set(self._place, whole.ctypes.data, 0, whole.nbytes)
        return True


class Watcher:
    """wanted: whether to compute up to this tensor and then call `got` with it."""

    def __init__(self, wanted: Callable[[GraphTensor], bool], got: Callable[[GraphTensor], None]) -> None:
        _declare()
        self.error: LacreError | MemoryError | None = None

        @ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
        def called(place: int, asks: bool, _user_data: object) -> bool:
            try:
                tensor = GraphTensor(place)
                if asks:
                    return wanted(tensor)
                got(tensor)
            except (LacreError, MemoryError) as exc:
                self.error = exc
                return False  # ends the step
            return True

        self.callback = called


def _declare() -> None:
    """Raises SettingsError if ggml's tensors differ from `_Struct`."""
    _llama.ggml_op_name.restype, _llama.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    _llama.ggml_nbytes.restype, _llama.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    _llama.ggml_tensor_overhead.restype = ctypes.c_size_t
    for move in (_llama.ggml_backend_tensor_get, _llama.ggml_backend_tensor_set):
        move.restype, move.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    if int(_llama.ggml_tensor_overhead()) != ctypes.sizeof(_Struct) + _OBJECT:
        raise SettingsError(
            f"llama-cpp-python {L.__version__} lays out tensors differently. Install the version that the lock file names."
        )
