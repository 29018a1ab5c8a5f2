"""Reads windows of a text with a model: the logits after each token, and what the layers compute on the way.

Rules:
- llama.cpp calls `Watcher` for each tensor of the graph. An error there is kept, and raised after the step.
- ggml has no function for a tensor's sources, so its struct is read. Its size is compared with ggml's own first.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import llama_cpp as L
import numpy as np
from llama_cpp.llama_cpp import _lib as _llama
from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback
from numpy.typing import NDArray

from lacre.errors import LacreError, SettingsError
from lacre_backend.engine.context import Batch, Logits
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import EngineError
from lacre_backend.workshop.source import WINDOW

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
    get = _llama.ggml_backend_tensor_get
    get.restype, get.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    if int(_llama.ggml_tensor_overhead()) != ctypes.sizeof(_Struct) + _OBJECT:
        raise SettingsError(
            f"llama-cpp-python {L.__version__} lays out tensors differently. Install the version that the lock file names."
        )


class WindowReader:
    """A context for one window of `size` tokens. Each call forgets the one before. outputs: rows of logits; None: of each."""

    def __init__(self, model: Model, watcher: Watcher | None = None, size: int = WINDOW, outputs: int | None = None) -> None:
        params = L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_outputs_max = outputs or size
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.no_perf = True
        if watcher is not None:
            params.cb_eval = watcher.callback
        self._model, self._watcher = model, watcher  # both are in use as long as the context is
        self._pointer: Any = L.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise SettingsError(f"There is too little memory to read {size} tokens with this model. Stop other programs.")
        self._batch = Batch(size)

    def logits(self, tokens: Sequence[int], skip: int = 0) -> Logits:
        """A row after each token from number `skip` on: (tokens - skip, vocabulary). The next call overwrites this view."""
        n, batch = len(tokens), self._batch
        batch.token[:n], batch.pos[:n], batch.sequence[:n] = tokens, range(n), 0
        batch.output[:skip], batch.output[skip:n] = 0, 1
        batch.struct.n_tokens = n
        L.llama_memory_clear(L.llama_get_memory(self._pointer), True)
        code = L.llama_decode(self._pointer, batch.struct)
        if self._watcher is not None and self._watcher.error is not None:
            raise self._watcher.error
        if code != 0:
            raise EngineError(f"llama.cpp could not read the text (code {code}). Check the model file.")
        return np.ctypeslib.as_array(L.llama_get_logits(self._pointer), (n - skip, self._model.n_vocab))

    def free(self) -> None:
        L.llama_free(self._pointer)


@contextmanager
def window_reader(
    model: Model, watcher: Watcher | None = None, size: int = WINDOW, outputs: int | None = None
) -> Iterator[WindowReader]:
    """Raises SettingsError."""
    reader = WindowReader(model, watcher, size, outputs)
    try:
        yield reader
    finally:
        reader.free()


def windows_of(model: Model, text: str, *, most: int, least: int) -> list[list[int]]:
    """The text's tokens in windows. most: tokens that are used. least: of the text, and of a window.

    Raises SettingsError if the text is shorter.
    """
    tokens = model.tokenize(text, special=False)
    if len(tokens) < least:
        raise SettingsError(f"The text has {len(tokens)} tokens, and {least} are the least. Give a longer one.")
    begin = [model.info.bos.id] if model.info.add_bos and model.info.bos is not None else []
    size = WINDOW - len(begin)
    windows = [begin + tokens[at : at + size] for at in range(0, min(len(tokens), most), size)]
    return [window for window in windows if len(window) >= least]
