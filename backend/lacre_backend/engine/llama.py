"""llama.cpp behind the engine protocol: one context, one long-lived thread that decodes, one sequence at a time.

Rules
- The context belongs to the decode thread alone. It lives as long as the engine: llama.cpp keeps its workers per calling
  thread, and a fresh thread per call decodes at less than half the speed.
- Cancellation, time limit and closing are looked at between steps; a step is at most `PREFILL_CHUNK` tokens.
- The cache is wiped, data and all, before the next task may begin: nothing of one request is left for another.
- Nothing about a prompt or an answer is logged, or part of an error.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp as L
import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.delivery import EventStream, Outbox
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import (
    EngineError,
    Event,
    Finish,
    FinishReason,
    ModelInfo,
    Task,
    TaskRefused,
    Token,
    check,
)
from lacre_backend.engine.sampling import Logits, Sampler, logprob
from lacre_backend.engine.text import TextStream

# Tokens of prompt per step: what a cancellation may have to wait for (0.3 s for the default model on two cores). Steps of 256
# or 512 take a prompt in 5 % faster.
PREFILL_CHUNK: Final = 128


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How to load a model. n_ctx: None takes the model's own, at most `DEFAULT_N_CTX`. threads: None takes every core that the
    process may use. n_gpu_layers: layers to put on a GPU, where llama.cpp was built for one; -1 for all.
    """

    n_ctx: int | None = None
    threads: int | None = None
    n_gpu_layers: int = -1


class _Job:
    """A task from its submission to its finish. The decode thread's, but for `cancelled`, which anyone may set."""

    def __init__(self, task: Task, stream: EventStream, sampler: Sampler, limit: int) -> None:
        self.task = task
        self.stream = stream
        self.sampler = sampler
        self.limit = limit  # tokens to generate: what was asked, and what the context has room for
        self.text = TextStream(task.stop)
        self.completion_tokens = 0
        self.cancelled = False
        self.deadline: float | None = None

    def start(self, now: float) -> None:
        self.deadline = None if self.task.time_limit is None else now + self.task.time_limit

    def interrupted(self) -> FinishReason | None:
        """Why to stop before the next step, if there is a reason."""
        if self.cancelled or self.stream.abandoned:
            return "cancelled"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "length"
        return None

    def finish(self, reason: FinishReason) -> Finish:
        text = "" if self.text.stopped else self.text.flush()
        if self.text.stopped and reason == "length":
            reason = "stop"
        return Finish(reason, len(self.task.prompt), 0, self.completion_tokens, text)


class _Context:
    """llama.cpp's context and its batch, for sequence 0."""

    def __init__(self, model: Model, threads: int) -> None:
        params = L.llama_context_default_params()
        params.n_ctx = model.info.n_ctx
        params.n_batch = params.n_ubatch = PREFILL_CHUNK
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.pointer = L.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise SettingsError(
                f"No memory for a context of {model.info.n_ctx} tokens. Set a smaller n_ctx, or a smaller model."
            )
        self._n_vocab = model.n_vocab
        self._memory = L.llama_get_memory(self.pointer)
        self._batch = L.llama_batch_init(PREFILL_CHUNK, 0, 1)
        shape = (PREFILL_CHUNK,)
        self._token = np.ctypeslib.as_array(self._batch.token, shape)
        self._pos = np.ctypeslib.as_array(self._batch.pos, shape)
        self._output = np.ctypeslib.as_array(self._batch.logits, shape)
        np.ctypeslib.as_array(self._batch.n_seq_id, shape)[:] = 1
        for i in range(PREFILL_CHUNK):
            self._batch.seq_id[i][0] = 0

    def decode(self, tokens: Sequence[int], position: int, *, output: bool) -> None:
        """One step: at most `PREFILL_CHUNK` tokens from `position` on. output: whether the last one's logits are wanted."""
        n = len(tokens)
        self._token[:n] = tokens
        self._pos[:n] = np.arange(position, position + n)
        self._output[:n] = 0
        self._output[n - 1] = output
        self._batch.n_tokens = n
        code = L.llama_decode(self.pointer, self._batch)
        if code != 0:
            raise EngineError(f"llama.cpp could not decode (code {code}). Try again, or with a shorter prompt.")

    def logits(self) -> Logits:
        """The last output's logits: a view that the next step overwrites."""
        return np.ctypeslib.as_array(L.llama_get_logits_ith(self.pointer, -1), (self._n_vocab,))

    def wipe(self) -> None:
        """Forget every cell and overwrite its data."""
        L.llama_memory_clear(self._memory, True)

    def free(self) -> None:
        self.wipe()
        L.llama_batch_free(self._batch)
        L.llama_free(self.pointer)


class LlamaEngine:
    """An `Engine`. Tasks run one after the other, in the order of their submission."""

    def __init__(self, path: Path, *, name: str, digest: str, settings: LlamaSettings | None = None) -> None:
        """Load `path`. Raises `SettingsError` if llama.cpp cannot."""
        settings = settings or LlamaSettings()
        threads = settings.threads or len(os.sched_getaffinity(0))
        if threads < 1:
            raise SettingsError(f"threads is {threads}; at least one is needed.")
        self._model = Model(path, name=name, digest=digest, n_ctx=settings.n_ctx, n_gpu_layers=settings.n_gpu_layers)
        self._context = _Context(self._model, threads)
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[str, _Job] = {}  # submitted and not finished
        self._closing = False
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name=f"decode {name}", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ModelInfo:
        return self._model.info

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._model.tokenize(text, special)

    def submit(self, task: Task) -> AsyncIterator[Event]:
        check(task, self.model)
        limit = min(task.max_tokens, self.model.n_ctx - len(task.prompt))
        job = _Job(task, EventStream(asyncio.get_running_loop()), Sampler(self._model, task.sampling, limit), limit)
        with self._changed:
            if self._closing or task.id in self._jobs:
                job.sampler.close()
                if self._closing:
                    raise EngineError("The engine is closed.")
                raise TaskRefused("A task of this id is not finished yet.", field="id")
            self._jobs[task.id] = job
            self._waiting.append(job)
            self._changed.notify()
        return job.stream

    def cancel(self, task_id: str) -> None:
        with self._changed:
            job = self._jobs.get(task_id)
            if job is None:
                return
            job.cancelled = True
            if job not in self._waiting:
                return  # the decode thread looks before its next step
            self._waiting.remove(job)
            del self._jobs[task_id]
        _end_unstarted(job)

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
            for job in self._jobs.values():
                job.cancelled = True
            for job in waiting:
                del self._jobs[job.task.id]
            self._changed.notify()
        for job in waiting:
            _end_unstarted(job)
        self._thread.join()
        self._context.free()

    # The decode thread

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._give_up()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.start(time.monotonic())
                end: Event | EngineError = job.finish(self._prefill(job) or self._generate(job))
            except EngineError as error:
                end = error
            with self._changed:
                del self._jobs[job.task.id]
            self._outbox.post(job.stream, end)
            self._outbox.flush()
            job.sampler.close()
            self._context.wipe()

    def _give_up(self) -> None:
        """The thread ends: nobody may wait for it any longer. After `close` there is nothing left to end here."""
        with self._changed:
            self._closing = True
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._waiting.clear()
        for job in jobs:
            self._outbox.post(job.stream, EngineError("The engine's thread ended. Restart the worker."))
        self._outbox.flush()

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _prefill(self, job: _Job) -> FinishReason | None:
        prompt = job.task.prompt
        for start in range(0, len(prompt), PREFILL_CHUNK):
            if reason := job.interrupted():
                return reason
            chunk = prompt[start : start + PREFILL_CHUNK]
            self._context.decode(chunk, start, output=start + len(chunk) == len(prompt))
        return None

    def _generate(self, job: _Job) -> FinishReason:
        position = len(job.task.prompt)
        while True:
            if reason := job.interrupted():
                return reason
            logits = self._context.logits()
            token = job.sampler.sample(self._context.pointer, -1, logits)
            if self._model.ends(token):
                return "stop"
            job.sampler.accept(token)
            self._emit(job, token, logits)
            if job.text.stopped:
                return "stop"
            if job.completion_tokens >= job.limit:
                return "length"
            self._context.decode((token,), position, output=True)
            position += 1

    def _emit(self, job: _Job, token: int, logits: Logits) -> None:
        raw = self._model.piece(token)
        job.completion_tokens += 1
        chosen: float | None = None
        top: Any = ()
        if job.task.logprobs is not None:
            chosen, top = logprob(self._model, logits, token, job.task.logprobs)
        self._outbox.post(job.stream, Token(token, job.text.push(raw), raw, chosen, top))
        self._outbox.flush()


def _end_unstarted(job: _Job) -> None:
    """Finish a task that the decode thread never saw."""
    outbox = Outbox()
    outbox.post(job.stream, job.finish("cancelled"))
    outbox.flush()
    job.sampler.close()
