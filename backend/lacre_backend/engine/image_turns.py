"""Tasks with images: one at a time, in a context of its own, beside the slots.

How: the text before and behind each image is computed in pieces, as the scheduler would; an image in one step for each of its
parts. Then the answer is sampled token by token, by the samplers that all tasks have.

Rules:
- Such a task takes nothing from the caches and leaves nothing there. Its context is overwritten and freed when it ends.
- The tasks wait for their turn by the pseudonyms of tenant and caller alone.
- The streams in the slots go on between two steps. They wait while a part of an image is computed.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import llama_cpp as L
import numpy as np

from lacre_backend.engine.context import FLASH, KV_TYPES, Batch, Logits, use_adapter
from lacre_backend.engine.delivery import Outbox
from lacre_backend.engine.job import EngineJob
from lacre_backend.engine.masks import GRACE
from lacre_backend.engine.projector import Chunks, Projector
from lacre_backend.engine.protocol import EngineError, Finish, FinishReason, Task
from lacre_backend.engine.sampling import choose
from lacre_backend.engine.scheduler import PIECE
from lacre_backend.engine.turns import FairQueue

_BATCH: Final = 256  # tokens of a text computed at a time while nothing else runs
_CELLS: Final = 256  # llama.cpp makes contexts of multiples of this many


class ImageTurns:
    """The tasks with images of one engine."""

    def __init__(self, projector: Projector, adapters: Mapping[str, Any], outbox: Outbox, lock: threading.Condition) -> None:
        """adapters: of the model, by name. outbox: the engine's, which it flushes after each step. lock: guards `jobs`."""
        self._model = projector.model
        self._projector = projector
        self._adapters = adapters
        self._outbox = outbox
        self._lock = lock
        self._random = np.random.default_rng()
        self.jobs: dict[str, EngineJob] = {}  # that are not finished
        self._inbox: list[EngineJob] = []  # those of `jobs` that the decode thread has not taken yet
        self._waiting: FairQueue[EngineJob] = FairQueue()
        self._running: tuple[EngineJob, Iterator[int]] | None = None
        self._context: _ImageContext | None = None
        self._most = _BATCH

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def enter(self, jobs: Sequence[EngineJob]) -> None:
        """Called by any thread that holds the lock, with unused ids."""
        self.jobs |= {job.task.id: job for job in jobs}
        self._inbox += jobs

    def step(self, most: int | None) -> None:
        """Computes a piece of at most so many tokens of text, at least one, or a part of an image. None: nothing else runs."""
        self._most = _BATCH if most is None else max(1, min(most, _BATCH))
        self._take_up()
        if self._running is None:
            self._begin()
        if self._running is None:
            return
        job, work = self._running
        if (reason := job.interrupted(time.monotonic())) is not None:
            self._end(job, job.finish(reason))
            return
        try:
            spent = next(work, None)
        except EngineError as error:
            self._end(job, error)
            return
        if spent is not None:
            self._waiting.spend(job.task.fair, spent)

    def give_up(self, error: EngineError | None) -> None:
        """The thread ends. error: None: the engine was closed."""
        self._take_up()
        for job in list(self.jobs.values()):
            self._end(job, job.finish("cancelled") if error is None else error)

    def _take_up(self) -> None:
        with self._lock:
            new, self._inbox = self._inbox, []
        for job in new:
            self._waiting.add(job.task.fair, job.task.id, job)
        for job in [job for job in self._waiting if job.cancelled or job.stream.abandoned]:
            self._end(job, job.finish("cancelled"))

    def _begin(self) -> None:
        job = self._waiting.next()
        if job is not None:
            self._waiting.take(job.task.fair, job.task.id, hold=True)
            job.start(0, time.monotonic())
            self._running = job, self._work(job)

    def _end(self, job: EngineJob, event: Finish | EngineError) -> None:
        with self._lock:
            del self.jobs[job.task.id]
        job.ended = True
        if self._running is None or self._running[0] is not job:
            self._waiting.drop(job.task.fair, job.task.id)
        else:
            self._running = None
            self._waiting.release(job.task.fair)
            if self._context is not None:
                self._context.free()
                self._context = None
        self._outbox.post(job.stream, event)
        job.sampler.close()

    def _work(self, job: EngineJob) -> Iterator[int]:
        """The task's work; yields after each piece how many tokens it had. Ends the task itself. Raises EngineError."""
        task = job.task
        adapter = None if task.adapter is None else self._adapters[task.adapter]
        context = self._context = _ImageContext(self._projector, task, job.limit, adapter)
        yield 0
        for read in context.prefill(self._pieces(task)):
            if (progress := job.progress(context.tokens)) is not None:
                self._outbox.post(job.stream, progress)
            yield read
        while True:
            while not job.sampler.ready(GRACE):
                time.sleep(GRACE)  # a costly mask, which another thread computes
                yield 0
            token = self._chosen(job, context)
            if self._model.ends(token):
                self._end(job, job.finish("stop"))
                return
            self._outbox.post(job.stream, job.said(self._model, token, context.logits))
            if (reason := _over(job)) is not None:
                self._end(job, job.finish(reason))
                return
            job.sampler.accept(token)
            context.read([token], output=True)
            yield 1

    def _pieces(self, task: Task) -> Iterator[Sequence[int] | Chunks]:
        """The prompt and the begun answer: pieces of text, whose size may change with each step, and images between them."""
        at = 0
        for placed in task.images:
            yield from self._text(task.prompt, at, placed.at)
            if not isinstance(placed.image, Chunks) or placed.image.belongs_to is not self._projector:
                raise EngineError("The image was read for another engine.")
            yield placed.image
            at = placed.at + placed.image.tokens
        yield from self._text(task.prompt, at, len(task.prompt))
        for start in range(0, len(task.begun), PIECE):  # in longer pieces, other kernels would round otherwise
            yield task.begun[start : start + PIECE]

    def _text(self, tokens: Sequence[int], start: int, end: int) -> Iterator[Sequence[int]]:
        while start < end:
            piece = tokens[start : min(start + self._most, end)]
            start += len(piece)
            yield piece

    def _chosen(self, job: EngineJob, context: _ImageContext) -> int:
        (token,) = choose([job.sampler], context.pointer, [None], context.logits[None], self._random)
        if isinstance(token, EngineError):
            raise token
        return token


def _over(job: EngineJob) -> FinishReason | None:
    if job.text.stopped:
        return "stop"
    return "length" if job.completion_tokens >= job.limit else None


class _ImageContext:
    """A context for one sequence of text and images. Raises EngineError if there is too little memory.

    tokens: computed so far. Positions may be fewer, because some models number an image's tokens by row and column.
    """

    def __init__(self, projector: Projector, task: Task, limit: int, adapter: Any | None) -> None:
        """limit: tokens of the answer."""
        model, compute = projector.model, projector.compute
        whole = max((image.whole for placed in task.images if isinstance(image := placed.image, Chunks)), default=0)
        params = L.llama_context_default_params()
        params.n_ctx = -(-(len(task.sequence) + limit) // _CELLS) * _CELLS
        params.n_batch = params.n_ubatch = max(_BATCH, whole)  # llama.cpp ends the process at less than what must be whole
        params.n_seq_max = params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = compute.threads
        params.flash_attn_type = FLASH[compute.flash]
        params.type_k = params.type_v = KV_TYPES[compute.kv_type]
        params.no_perf = True
        self.tokens = 0
        self._position = 0
        self._n_vocab = model.n_vocab
        self._last = len(task.sequence)
        self._projector = projector
        self._most = params.n_batch
        self.pointer: Any = L.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EngineError("There is too little memory for a prompt with images. Try again, or with a shorter one.")
        self._batch = Batch(_BATCH)
        try:
            use_adapter(self.pointer, adapter)
        except EngineError:
            self.free()
            raise

    @property
    def logits(self) -> Logits:
        """Behind the last token."""
        return np.ctypeslib.as_array(L.llama_get_logits_ith(self.pointer, -1), (self._n_vocab,))

    def prefill(self, pieces: Iterator[Sequence[int] | Chunks]) -> Iterator[int]:
        """Computes text and images. Yields the tokens of each step. Raises EngineError."""
        for piece in pieces:
            if isinstance(piece, Chunks):
                yield from self._show(piece)
            else:
                self.read(piece, output=self.tokens + len(piece) == self._last)
                yield len(piece)

    def read(self, tokens: Sequence[int], *, output: bool) -> None:
        """output: whether to compute the logits behind the last one."""
        n, batch = len(tokens), self._batch
        batch.token[:n], batch.sequence[:n] = tokens, 0
        batch.pos[:n] = range(self._position, self._position + n)
        batch.output[:n] = 0
        batch.output[n - 1] = output
        batch.struct.n_tokens = n
        _succeeded(L.llama_decode(self.pointer, batch.struct))
        self._position += n
        self.tokens += n

    def _show(self, image: Chunks) -> Iterator[int]:
        m = self._projector.mtmd
        for chunk in image:
            after = L.llama_pos(self._position)
            code = m.mtmd_helper_eval_chunk_single(
                self._projector.pointer, self.pointer, chunk, self._position, 0, self._most, False, ctypes.byref(after)
            )
            _succeeded(code)
            n = int(m.mtmd_input_chunk_get_n_tokens(chunk))
            self._position = int(after.value)
            self.tokens += n
            yield n

    def free(self) -> None:
        L.llama_memory_clear(L.llama_get_memory(self.pointer), True)
        L.llama_free(self.pointer)


def _succeeded(code: int) -> None:
    if code != 0:
        raise EngineError(f"llama.cpp could not compute a prompt with images (code {code}). Try again, or with a shorter one.")
