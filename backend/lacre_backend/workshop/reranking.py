"""Scores documents for a query with a reranker: a model whose file says `pooling_type` RANK.

A query and a document become one text as `lacre_backend.engine.pairs` says. No text of an example becomes a control token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import llama_cpp as L
import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.context import Batch
from lacre_backend.engine.model import Model, ModelMetadata
from lacre_backend.engine.pairs import pair_form
from lacre_backend.engine.protocol import EngineError, PairPart

MOST_TOKENS: Final = 2048  # of a query and a document: attention's memory grows with their square


class RankReader:
    """tokens, seconds: read so far, and the time that it took."""

    def __init__(self, path: Path, model: Model) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._size = min(ModelMetadata.read(path).n_ctx_train, MOST_TOKENS)
        params = L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._size
        params.n_seq_max = 1
        params.embeddings = True
        params.pooling_type = L.LLAMA_POOLING_TYPE_RANK
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.no_perf = True
        self._model = model  # in use as long as the context is
        self._pointer: Any = L.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise SettingsError(f"There is too little memory to read {self._size} tokens with this model. Stop other programs.")
        self._memory = L.llama_get_memory(self._pointer)  # an encoder has none
        self._batch = Batch(self._size)
        self._form = pair_form(model.pointer, model.tokenize)

    def score(self, query: str, document: str) -> float:
        """Higher is better. Raises SettingsError if both do not fit, or the score is not a number; EngineError."""
        tokens = self._joined(query, document)
        n, batch = len(tokens), self._batch
        if n > self._size:
            raise SettingsError(f"the query and a document have {n:,} tokens, and the model reads {self._size:,}")
        batch.token[:n], batch.pos[:n], batch.sequence[:n], batch.output[:n] = tokens, range(n), 0, 1
        batch.struct.n_tokens = n
        if self._memory:
            L.llama_memory_clear(self._memory, True)
        began = time.perf_counter()
        code = L.llama_decode(self._pointer, batch.struct)
        pooled: Any = L.llama_get_embeddings_seq(self._pointer, 0)
        self.tokens, self.seconds = self.tokens + n, self.seconds + time.perf_counter() - began
        if code != 0 or not pooled:
            raise EngineError(f"llama.cpp could not score a document (code {code}). Check the model file.")
        if not np.isfinite(pooled[0]):
            raise SettingsError("the model computes scores that are infinite or not numbers. Copy the file again.")
        return float(pooled[0])

    def free(self) -> None:
        L.llama_free(self._pointer)

    def _joined(self, query: str, document: str) -> list[int]:
        texts = {PairPart.QUERY: query, PairPart.DOCUMENT: document}
        pieces = [self._model.tokenize(texts[part], False) if isinstance(part, PairPart) else part for part in self._form]
        return [token for piece in pieces for token in piece]


@contextmanager
def rank_reader(path: Path, model: Model) -> Iterator[RankReader]:
    """Raises SettingsError."""
    reader = RankReader(path, model)
    try:
        yield reader
    finally:
        reader.free()
