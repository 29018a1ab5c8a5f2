"""Reads windows of a text with a model: the logits after each token, and what a watcher sees on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp as L
import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.context import Batch, Logits
from lacre_backend.engine.graph import Watcher
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import EngineError
from lacre_backend.workshop.source import WINDOW


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
