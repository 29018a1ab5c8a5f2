"""Turns texts into vectors, or pairs of texts into scores: llama.cpp with an encoder or a like model, as an engine.

Rules:
- Several texts share one batch, each as its own sequence. `packing.py` chooses them.
- A text is computed whole in one step, because an encoder's tokens depend on later ones. So nothing is kept between batches.
- A vector is pooled as the model's file says, and has length one.
- As in `generate.py`, one permanent thread owns the context, and callers leave tasks and cancellations behind a lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_backend.engine.context import FLASH, Batch
from lacre_backend.engine.delivery import Outbox, TaskEvents, TaskStream
from lacre_backend.engine.model import Model, ModelMetadata, Weights
from lacre_backend.engine.pace import PREFILL
from lacre_backend.engine.packing import Packing, Room
from lacre_backend.engine.protocol import (
    DIED,
    Embedding,
    EngineError,
    Event,
    Finish,
    Grammar,
    ModelInfo,
    Task,
    TaskKind,
    TaskRefused,
    check,
)
from lacre_backend.engine.sizing import LlamaSettings, memory_for_caches
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.watch import EngineHealth

DEFAULT_CONTEXT: Final = 2048  # tokens of one text: attention's memory grows with the square of a batch
DEFAULT_TEXTS: Final = 16  # per batch
CLOSE_LIMIT: Final = 30.0  # seconds for a running step; a large one takes several on a slow machine
STEP: Final = 512  # tokens of a batch of short texts; in larger ones each text pays for attention to its neighbours
_POOLED: Final = (L.LLAMA_POOLING_TYPE_MEAN, L.LLAMA_POOLING_TYPE_CLS, L.LLAMA_POOLING_TYPE_LAST)


class _Job:
    """A text from submission to finish."""

    def __init__(self, task: Task, stream: TaskStream) -> None:
        self.task = task
        self.stream = stream


class LlamaEmbedder:
    """An `Engine` whose only kind is `EMBED`. slots: texts in one batch."""

    kind: ClassVar = TaskKind.EMBED

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        digest: str,
        settings: LlamaSettings | None = None,
        tokenizer: Tokenizer | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Loads `path`. tokenizer, weights: as in `LlamaEngine`.

        Raises `SettingsError` if llama.cpp cannot load it, or the settings do not fit the model.
        """
        settings = settings or LlamaSettings()
        tokenizer = tokenizer or Tokenizer(path)
        context = _context(path, settings, self.kind)
        self._model = Model(
            path,
            name=name,
            digest=digest,
            n_ctx=context,
            gpu=settings.gpu,
            kind=self.kind,
            tokenizer=tokenizer,
            weights=weights,
        )
        self.vocabulary = self._model.vocabulary
        self._packing = Packing(Room(max(context, STEP), settings.slots or DEFAULT_TEXTS))
        self._encoder = _Encoder(self._model, self._packing.room, settings)
        self._outbox = Outbox()
        self._changed = threading.Condition()
        self._watch = EngineHealth()
        self._jobs: dict[str, _Job] = {}  # submitted and not finished
        self._closing = self._closed = False
        self.steps = 0
        self._thread = tasks.thread(f"embed {name}", self._run)

    @property
    def model(self) -> ModelInfo:
        return self._model.info

    @property
    def died(self) -> bool:
        return self._thread.died is not None

    @property
    def stuck(self) -> bool:
        return self._watch.stuck

    @property
    def slots(self) -> int:
        return self._packing.room.texts

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._model.tokenize(text, special)

    def speak(self, tokens: Sequence[int]) -> None:
        """It generates nothing."""

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:  # noqa: ARG002 - it generates nothing
        return []

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return await self._model.tokenizer.tokens(texts)

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:  # noqa: ARG002 - it takes none
        raise TaskRefused("This engine does not generate.", field="grammar")

    def submit(self, task: Task) -> AsyncIterator[Event]:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        streams = [TaskEvents.here() for _ in tasks]
        self.submit_to(tasks, streams)
        return [*streams]

    def submit_to(self, tasks: Sequence[Task], streams: Sequence[TaskStream]) -> None:
        """As in `LlamaEngine`."""
        for task in tasks:
            check(task, self.model)
        jobs = {task.id: _Job(task, stream) for task, stream in zip(tasks, streams, strict=True)}
        with self._changed:
            if self._closing:
                raise EngineError(DIED if self.died else "The engine is closed.")
            if len(jobs) < len(tasks) or not self._jobs.keys().isdisjoint(jobs):
                raise TaskRefused("An unfinished task has this id.", field="id")
            self._jobs |= jobs
            for task in tasks:
                self._packing.add(task.id, len(task.prompt), task.fair)
            self._changed.notify()

    def cancel(self, task_id: str) -> None:
        """A text in the running step ends with that step."""
        with self._changed:
            if self._packing.drop(task_id):
                job = self._jobs.pop(task_id)
                job.stream.road.deliver([(job.stream, _finish(job, cancelled=True))])

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = self._closing = True  # already closing if its thread has died
            self._changed.notify()
        ended = self._thread.join(CLOSE_LIMIT)
        self._model.tokenizer.close()
        if ended:  # memory that a thread still uses is not freed
            self._encoder.free()

    # The thread

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._watch.step()
                self._step(batch)
                self._watch.rest()
        finally:
            self._give_up()

    def _take(self) -> list[_Job]:
        """Waits for work. Empty: the engine is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._packing))
            return [] if self._closing else [self._jobs[text_id] for text_id in self._packing.take()]

    def _step(self, batch: list[_Job]) -> None:
        events: list[Embedding | EngineError]
        failed: EngineError | None = None
        try:
            vectors = self._encoder.encode([job.task.prompt for job in batch])
            events = [Embedding(tuple(vector.tolist())) for vector in vectors]
            self._watch.done()
        except EngineError as error:
            failed, events = error, [error] * len(batch)
        self.steps += 1
        with self._changed:
            for job in batch:
                del self._jobs[job.task.id]
        for job, event in zip(batch, events, strict=True):
            self._outbox.post(job.stream, event)
            if isinstance(event, Embedding):
                self._outbox.post(job.stream, _finish(job))
        self._outbox.flush()
        if failed is not None:
            self._watch.failed(failed)

    def _give_up(self) -> None:
        """The thread ends: fails every waiting text."""
        with self._changed:
            closed, self._closing = self._closing, True
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            broken = EngineError(DIED)
            self._outbox.post(job.stream, _finish(job, cancelled=True) if closed else broken)
        self._outbox.flush()


class LlamaReranker(LlamaEmbedder):
    """An `Engine` whose only kind is `RERANK`: each task is a query and a document as one text."""

    kind: ClassVar = TaskKind.RERANK


def _finish(job: _Job, *, cancelled: bool = False) -> Finish:
    return Finish("cancelled" if cancelled else "stop", len(job.task.prompt), 0, 0)


class _Encoder:
    """llama.cpp's context for batches of whole texts. Raises SettingsError if there is not enough memory for it."""

    def __init__(self, model: Model, room: Room, settings: LlamaSettings) -> None:
        params = L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = room.tokens
        params.n_seq_max = room.texts
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = L.LLAMA_POOLING_TYPE_UNSPECIFIED  # as the model's file says
        params.n_threads = params.n_threads_batch = settings.threads or len(os.sched_getaffinity(0))
        params.flash_attn_type = FLASH[settings.flash]
        params.no_perf = True
        self._pointer = L.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise SettingsError(f"No memory for batches of {room.tokens} tokens. Set a smaller context, or a smaller model.")
        self._model = model  # keeps it from being freed
        self._memory = L.llama_get_memory(self._pointer)  # an encoder has none
        self._ranks = TaskKind.RERANK in model.info.kinds
        self._n_embd = 1 if self._ranks else model.info.n_embd  # of several classes the first one is the score
        self._batch = Batch(room.tokens)

    def encode(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """For each text one row: a vector of length one, or a score. Raises EngineError."""
        self._wipe()
        batch, n = self._batch, 0
        for sequence, tokens in enumerate(texts):
            end = n + len(tokens)
            batch.token[n:end] = tokens
            batch.pos[n:end] = range(len(tokens))
            batch.sequence[n:end] = sequence
            n = end
        batch.output[:n] = 1
        batch.struct.n_tokens = n
        code = L.llama_decode(self._pointer, batch.struct)
        if code != 0:
            raise EngineError(f"llama.cpp could not embed (code {code}). Try again, or with shorter texts.")
        vectors = np.stack([self._pooled(sequence) for sequence in range(len(texts))])
        if self._ranks:
            if not np.isfinite(vectors).all():
                raise EngineError("The model computes scores that are infinite or not numbers. Copy its file again.")
            return vectors
        lengths = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        units: NDArray[np.float32] = vectors / np.maximum(lengths, np.float32(1e-12))
        return units

    def free(self) -> None:
        self._wipe()
        L.llama_free(self._pointer)

    def _pooled(self, sequence: int) -> NDArray[np.float32]:
        pointer: Any = L.llama_get_embeddings_seq(self._pointer, sequence)
        if not pointer:
            raise EngineError("llama.cpp returned no vector.")
        return np.ctypeslib.as_array(pointer, (self._n_embd,)).copy()

    def _wipe(self) -> None:
        if self._memory:
            L.llama_memory_clear(self._memory, True)


def _context(path: Path, settings: LlamaSettings, kind: TaskKind) -> int:
    """The tokens of one text. Raises SettingsError."""
    facts = ModelMetadata.read(path)
    if facts.ranks and kind is TaskKind.EMBED:
        raise SettingsError(f"{path.name} is a reranker, which does not embed. Give a model that embeds.")
    if facts.pooling not in _POOLED and not facts.ranks:
        raise SettingsError(
            f"{path.name} does not say how to make one vector of a text (pooling by mean, first or last token). "
            "Convert the model with its pooling type."
        )
    if settings.unified or settings.cells is not None:
        raise SettingsError(f"{path.name} does not generate and has no cache: remove `unified` and `cells`.")
    if settings.kv_type != "f16":
        raise SettingsError(f"{path.name} does not generate and has no cache: remove `kv_type`.")
    if settings.idle_caches:
        raise SettingsError(f"{path.name} does not generate and has no cache: remove `idle_caches`.")
    if (settings.n_batch, settings.n_ubatch, settings.chunk, settings.burst, settings.prefill) != (*[None] * 4, PREFILL):
        raise SettingsError(
            f"{path.name} does not generate: remove `n_batch`, `n_ubatch`, `chunk`, `burst` and `prefill`. "
            "Its steps have as many tokens as its context."
        )
    memory_for_caches(path, facts, settings)
    if settings.n_ctx is not None and facts.n_ctx_most is not None and settings.n_ctx > facts.n_ctx_most:
        raise SettingsError(f"context is {settings.n_ctx}; {path.name} was trained on at most {facts.n_ctx_most} tokens.")
    return settings.n_ctx or min(facts.n_ctx_train, DEFAULT_CONTEXT)
