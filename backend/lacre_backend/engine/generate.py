"""Runs llama.cpp behind the engine protocol: many sequences in one context, and one permanent thread that decodes.

Rules:
- The scheduler decides, the context executes, the samplers choose. This file connects them to each other and to callers.
- Only the decode thread uses the context, the scheduler and the samplers. Callers leave tasks and cancellations behind a lock.
  The thread takes them between steps, so each takes effect within one step.
- No log line and no error contains any part of a prompt or answer.
- A scope's cache is removed some time after its last use. When nothing is cached or running, the cells' data is overwritten
  (`cache_care.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import llama_cpp as L
import numpy as np

from lacre.runtime import tasks
from lacre_backend.engine.adapted import AdaptedEngine, adapted_name
from lacre_backend.engine.adapters import AdapterFile, load, size
from lacre_backend.engine.beside import Beside
from lacre_backend.engine.cache_care import CacheCare
from lacre_backend.engine.context import Compute, LlamaContext, Logits
from lacre_backend.engine.delivery import Outbox, TaskEvents, TaskStream
from lacre_backend.engine.draft_model import DraftFile
from lacre_backend.engine.job import EngineJob, begin
from lacre_backend.engine.lens import LensTask
from lacre_backend.engine.masks import GRACE, Masks
from lacre_backend.engine.model import Model, Weights
from lacre_backend.engine.pace import Pace, SteadyPace
from lacre_backend.engine.parked import LOOK, Parked
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan
from lacre_backend.engine.projector import Projector, ProjectorFile
from lacre_backend.engine.protocol import (
    DIED,
    EngineError,
    Event,
    Finish,
    FinishReason,
    Grammar,
    ModelInfo,
    Task,
    TaskRefused,
    check,
)
from lacre_backend.engine.rows import Rows
from lacre_backend.engine.sampling import choose
from lacre_backend.engine.scheduler import NO_DRAFTS, Scheduler
from lacre_backend.engine.sizing import EngineSizing, LlamaSettings, derive, free_memory
from lacre_backend.engine.speculation import speculation
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.vault import VaultCounts
from lacre_backend.engine.watch import EngineHealth

__all__ = ["LlamaEngine", "LlamaSettings"]

CLOSE_LIMIT: Final = 30.0  # seconds for a running step; a large one takes several on a slow machine


class LlamaEngine:
    """An `Engine`. slots: tasks that run at a time; others wait."""

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        digest: str,
        settings: LlamaSettings | None = None,
        tokenizer: Tokenizer | None = None,
        weights: Weights | None = None,
        adapters: Sequence[AdapterFile] = (),
        draft: DraftFile | None = None,
        projector: ProjectorFile | None = None,
    ) -> None:
        """Loads `path`. tokenizer: of that file; by default the engine starts one. The engine closes it.

        weights: as in `Model`. adapters: served by the engines in `adapted`. draft: for the speculation of that name.
        projector: what reads images; `digest` must cover it. Raises `SettingsError` if one of the files cannot be loaded.
        """
        settings = settings or LlamaSettings()
        # Before anything else reads the file: a bad file may abort the process that reads it
        tokenizer = tokenizer or Tokenizer(path)
        beside = size([*adapters, *([] if projector is None else [projector])])
        shape = derive(path, settings, beside=beside, draft=None if draft is None else draft.path)
        self._model = Model(
            path, name=name, digest=digest, n_ctx=shape.limits.context, gpu=settings.gpu, tokenizer=tokenizer, weights=weights
        )
        self.tokenizer, self.vocabulary = tokenizer, self._model.vocabulary
        self._adapters = load(self._model, path, adapters)
        self.speculation = speculation(settings, self._model, shape, draft)
        compute = Compute(shape.threads, settings.flash, settings.kv_type, settings.n_ubatch)
        sees = None if projector is None else Projector(self._model, path, projector, compute, gpu=settings.gpu.layers != 0)
        self._model.info = replace(self._model.info, images=sees)
        limits = self._savable(shape)
        self._context = LlamaContext(self._model, limits, compute, self._adapters)
        if limits.saved:
            self._context.keep_copies(shape.idle_bytes, free_memory)
        self.adapted = [AdaptedEngine(self, each.name, each.digest, adapted_name(name, each.name)) for each in adapters]
        self._masks = Masks(self._model)
        self._pace = SteadyPace(lambda: Pace(shape.limits.share, shape.limits.most, settings.prefill))
        self._scheduler = Scheduler(limits, self._pace.share)
        self._caches = CacheCare(self._scheduler, self._context, self.speculation)
        self._random = np.random.default_rng()
        self._outbox = Outbox()
        self._changed = threading.Condition()
        self._parked = Parked(self._changed)
        self._beside = Beside(self._model, compute, self._adapters, self._outbox, self._changed, projector=sees)
        self._watch = EngineHealth()
        self._jobs: dict[str, EngineJob] = {}  # submitted and not finished
        self._rows = Rows()  # of choices that are not finished
        self._inbox: list[EngineJob] = []  # those of `_jobs` that the decode thread has not taken yet
        self._cancelled: list[EngineJob] = []  # since the decode thread's last check
        self._closing = self._closed = False
        self.steps = 0
        self.computed_tokens = 0  # submitted to `llama_decode`, without fillers
        self._thread = tasks.thread(f"decode {name}", self._run)

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
        return self._scheduler.limits.slots

    @property
    def held(self) -> tuple[int, int]:
        """Unfinished tasks, and cells in use including caches. Exact while nothing runs."""
        return len(self._jobs) + len(self._beside.ids), self._scheduler.limits.cells - self._scheduler.free_cells

    @property
    def idle_caches(self) -> VaultCounts:
        """Of the copies of idle caches."""
        vault = self._context.vault
        return VaultCounts() if vault is None else replace(vault.counts)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._model.tokenize(text, special)

    def speak(self, tokens: Sequence[int]) -> None:
        self._model.speak(tokens)

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        return self._model.released(tokens, stop)

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return await self._model.tokenizer.tokens(texts)

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        return self._masks.compile(source, begun)

    def submit(self, task: Task) -> AsyncIterator[Event]:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        streams = [TaskEvents.here() for _ in tasks]
        self.submit_to(tasks, streams)
        return [*streams]

    def submit_to(self, tasks: Sequence[Task], streams: Sequence[TaskStream]) -> None:
        """As `submit_all`, from any thread. streams: take the events."""
        for task in tasks:
            check(task, self.model)
            if task.adapter is not None and task.adapter not in self._adapters:
                raise TaskRefused("The engine has no such adapter.", field="adapter")
        pairs, jobs = list(zip(tasks, streams, strict=True)), list[EngineJob]()
        lensed = [LensTask(task, stream) for task, stream in pairs if task.lens]
        try:
            jobs += (begin(task, stream, self._model, self._masks) for task, stream in pairs if not task.lens)
            self._enter([job for job in jobs if job.lacks_tokens], lensed)
        except BaseException:  # their samplers hold memory of llama.cpp
            for job in jobs:
                job.sampler.close()
            raise
        for job in (each for each in jobs if not each.lacks_tokens):
            job.sampler.close()
            job.stream.road.deliver([(job.stream, job.finish("length"))])

    def _savable(self, shape: EngineSizing) -> EngineLimits:
        """The limits, without copies where they would lack cells: llama.cpp copies none outside of a layer's window."""
        return replace(shape.limits, saved=0) if L.llama_model_n_swa(self._model.pointer) > 0 else shape.limits

    def _enter(self, jobs: Sequence[EngineJob], lensed: Sequence[LensTask]) -> None:
        """Enters all jobs at once, or none."""
        with self._changed:
            if self._closing:
                raise EngineError(DIED if self.died else "The engine is closed.")
            names = {*(job.task.id for job in jobs), *(each.task.id for each in lensed)}
            if len(names) < len(jobs) + len(lensed) or not names.isdisjoint({*self._jobs, *self._beside.ids}):
                raise TaskRefused("An unfinished task has this id.", field="id")
            plain = [job for job in jobs if not job.task.images]
            self._rows.add([job.task for job in plain])
            self._jobs |= {job.task.id: job for job in plain}
            self._inbox += plain
            self._beside.enter(lensed, [job for job in jobs if job.task.images])
            self._changed.notify()

    def cancel(self, task_id: str) -> None:
        with self._changed:
            if job := self._jobs.get(task_id):
                job.cancelled = True
                self._cancelled.append(job)
                self._changed.notify()
            else:
                self._beside.cancel(task_id)

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = self._closing = True  # already closing if its thread has died
            self._changed.notify()
        ended = self._thread.join(CLOSE_LIMIT)
        self._model.tokenizer.close()
        self._masks.close()
        if self._model.info.images is not None:
            self._model.info.images.close()
        if ended:  # memory that a thread still uses is not freed
            self._context.free()
            if self.speculation is not None:
                self.speculation.close()

    # The decode thread

    def _run(self) -> None:
        try:
            while self._take_up():
                self._watch.step()
                if self._scheduler.busy:
                    self._step()
                if self._beside.busy:
                    self._beside.step(self._scheduler.share if self._scheduler.busy else None)
                self._watch.rest()
        finally:
            self._give_up()

    def _take_up(self) -> bool:
        """Takes what callers left, or waits for it if there is nothing else to do. False: the engine is closing."""
        while True:
            with self._changed:
                if self._closing:
                    return False
                idle = not (self._inbox or self._cancelled or self._scheduler.busy or self._beside.busy)
                timed_out = idle and not self._changed.wait(self._caches.patience())
                new, self._inbox = self._inbox, []
                cancelled, self._cancelled = self._cancelled, []
            for job in new:
                task, tokens = job.task, job.tokens
                self._scheduler.submit(
                    task.id, tokens, task.cache_scope, fair=task.fair, group=task.group, adapter=task.adapter
                )
            for job in cancelled:
                if not job.ended:
                    self._end(job, "cancelled")
            if timed_out and not self._scheduler.busy:
                self._caches.tidy()
            if self._scheduler.busy or self._beside.busy:
                return True
            self._outbox.flush()

    def _step(self) -> None:
        now = time.monotonic()
        self._caches.look(now)
        self._resume(now)
        plan = self._scheduler.plan(self._drafts())
        for task_id in plan.admitted:
            self._start(self._jobs[task_id], now)
        working = [self._jobs[segment.task] for segment in plan.segments if segment.task is not None]
        working += [self._jobs[task_id] for task_id in plan.copied]
        try:
            for step in self._context.remember(plan.memory):
                self._scheduler.lost(step)
                self._start(self._jobs[step.task], now)
            began = time.monotonic()
            rows = self._context.compute(plan)
        except EngineError as error:
            self._fail(working, error)
            return
        if plan.segments:
            self._watch.done()
            self._caches.dirty = True
            self._record(plan, time.monotonic() - began)
        self._tell_read(plan)
        outputs = [segment for segment in plan.segments if segment.output]
        if any(segment.task is not None for segment in outputs):
            self._results(outputs, rows)
        self._begin_copied(plan)
        self._interrupt(working)
        self._outbox.flush()
        if not plan.segments and self._parked:
            self._await_masks()

    def _start(self, job: EngineJob, now: float) -> None:
        job.start(self._scheduler.cached(job.task.id), now)
        self._caches.use(job.task.cache_scope, now)

    def _drafts(self) -> Mapping[str, Sequence[int]]:
        """Guesses for the next step, by task."""
        if self.speculation is None or not (generating := self._scheduler.generating):
            return NO_DRAFTS
        return self.speculation.drafts([self._jobs[task_id].wanted() for task_id in generating])

    def _record(self, plan: StepPlan, seconds: float) -> None:
        computed = sum(len(segment.tokens) for segment in plan.segments if segment.task is not None)
        reading = computed - plan.generating - plan.drafted
        if not plan.drafted:
            self._pace.observe(plan.generating, reading, seconds, plan.attended)
        if self.speculation is not None and reading == 0:
            self.speculation.executed(plan, seconds)
        self.steps += 1
        self.computed_tokens += computed

    def _tell_read(self, plan: StepPlan) -> None:
        """Reports progress of prompts that need further steps."""
        for segment in plan.segments:
            if segment.task is not None and not segment.output:
                job = self._jobs[segment.task]
                if (progress := job.progress(segment.start + len(segment.tokens))) is not None:
                    self._outbox.post(job.stream, progress)

    def _results(self, outputs: list[Segment], rows: list[int]) -> None:
        """outputs: the segments with logits. rows: of all of them, in the batch."""
        every = logits = self._context.logits(len(rows))
        all_rows = rows
        first = [0, *itertools.accumulate(segment.rows for segment in outputs)][:-1]
        if len(outputs) < len(rows):
            logits, rows = every[first], [rows[i] for i in first]
        jobs = [None if segment.task is None else self._jobs[segment.task] for segment in outputs]  # a filler's are ignored
        self._keep(jobs, logits)
        for job in jobs:
            if job is not None:  # a task that was sent back while it waited for its mask, and was read again, uses these logits
                self._parked.drop(job.task.id)
        until = time.monotonic() + GRACE
        late = {i for i, job in enumerate(jobs) if job is not None and not job.sampler.ready(until - time.monotonic())}
        for i in late:
            self._parked.put(jobs[i], logits[i])
        wanted = [i for i, job in enumerate(jobs) if job is not None and i not in late]
        if len(wanted) < len(outputs):
            logits, rows = logits[wanted], [rows[i] for i in wanted]
        confirmed = self._choose([job for i in wanted if (job := jobs[i]) is not None], rows, logits)
        if len(outputs) < len(all_rows):
            self._confirm(confirmed, {job: i for job, i in zip(jobs, first, strict=True) if job is not None}, all_rows, every)

    def _confirm(self, confirmed: list[EngineJob], first: dict[EngineJob, int], rows: list[int], logits: Logits) -> None:
        """Chooses on for tasks whose guess was right. first: the index of each task's first row in `rows` and `logits`."""
        right = dict.fromkeys(first, 0)
        while confirmed:
            for job in confirmed:
                right[job] += 1
            at = [first[job] + right[job] for job in confirmed]
            confirmed = self._choose(confirmed, [rows[i] for i in at], logits[at])
        if self.speculation is not None:
            for job, number in right.items():
                self.speculation.settle(job.task.id, number, ended=job.ended)

    def _keep(self, jobs: list[EngineJob | None], logits: Logits) -> None:
        """Keeps the logits at the end of prompts that further choices share."""
        with self._changed:
            for job, row in zip(jobs, logits, strict=True):
                if job is not None and job.completion_tokens == 0:
                    self._rows.keep(job.task, row)

    def _begin_copied(self, plan: StepPlan) -> None:
        """Samples the first tokens of choices whose prompt a sibling read."""
        for task_id in plan.copied:
            job = self._jobs[task_id]
            with self._changed:
                row = self._rows.of(job.task)
            if task_id in self._parked:
                continue  # sent back while it waited for its mask, and still waiting
            if row is None:
                self._drop(job, EngineError("The prompt of a choice was lost. Send the request again."), keep=False)
            elif job.sampler.ready(0):
                self._choose([job], [None], row[None])
            else:
                self._parked.put(job, row)

    def _choose(self, jobs: list[EngineJob], rows: Sequence[int | None], logits: Logits) -> list[EngineJob]:
        """rows: each job's row in the batch; None if its logits are from an earlier one. Returns the jobs whose token had been
        guessed, so that the batch has the logits that follow it.
        """
        if not jobs:
            return []
        confirmed: list[EngineJob] = []
        tokens = choose([job.sampler for job in jobs], self._context.pointer, rows, logits, self._random)
        now = time.monotonic()
        for job, token, row in zip(jobs, tokens, logits, strict=True):
            if reason := job.interrupted(now):
                self._end(job, reason)
            elif isinstance(token, EngineError):
                self._drop(job, token, keep=True)
            elif not job.task.given and self._model.ends(token):
                self._end(job, "stop")
            elif self._emit(job, token, row):
                confirmed.append(job)
        return confirmed

    def _emit(self, job: EngineJob, token: int, logits: Logits) -> bool:
        """Whether the token had been guessed, and the job goes on."""
        self._outbox.post(job.stream, job.said(self._model, token, logits))
        if job.text.stopped:
            self._end(job, "stop")
        elif job.completion_tokens >= job.limit:
            self._end(job, "length")
        else:
            job.sampler.accept(token)
            return self._scheduler.advance(job.task.id, token)
        return False

    # Late masks

    def _resume(self, now: float) -> None:
        """Samples for parked jobs whose mask is ready, and ends interrupted ones."""
        for job, logits in self._parked.each():
            if reason := job.interrupted(now):
                self._end(job, reason)
            elif job.sampler.ready(0):
                self._parked.drop(job.task.id)
                self._choose([job], [None], logits[None])

    def _await_masks(self) -> None:
        """Waits for a mask or for callers, when there is nothing else to do."""
        with self._changed:
            if self._parked.all_late and not (self._closing or self._inbox or self._cancelled):
                self._changed.wait(LOOK)

    def _interrupt(self, working: list[EngineJob]) -> None:
        """Ends tasks whose time is up or whose caller has gone, while they read their prompt."""
        now = time.monotonic()
        for job in working:
            if not job.ended and (reason := job.interrupted(now)):
                self._end(job, reason)

    def _end(self, job: EngineJob, reason: FinishReason) -> None:
        self._drop(job, job.finish(reason), keep=True)

    def _drop(self, job: EngineJob, event: Finish | EngineError, *, keep: bool) -> None:
        job.ended = True
        self._parked.drop(job.task.id)  # keep nothing of a finished answer here, even while nothing else runs
        self._scheduler.end(job.task.id, keep=keep)
        if self.speculation is not None:
            self.speculation.forget(job.task.id)
        if keep:
            self._caches.use(job.task.cache_scope, time.monotonic())
        with self._changed:
            del self._jobs[job.task.id]
            self._rows.remove(job.task)
        self._outbox.post(job.stream, event)
        job.sampler.close()

    def _fail(self, working: list[EngineJob], error: EngineError) -> None:
        """Handles a failed step: the cache of every task in it is discarded."""
        for job in working:
            self._drop(job, error, keep=False)
        self._outbox.flush()
        self._watch.failed(error)

    def _give_up(self) -> None:
        """The thread ends: fails every waiting task."""
        with self._changed:
            closed, self._closing = self._closing, True
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._inbox.clear()
        for job in jobs:
            broken = EngineError(DIED)
            self._outbox.post(job.stream, job.finish("cancelled") if closed else broken)
            job.sampler.close()
        self._beside.give_up(None if closed else EngineError(DIED))
        self._outbox.flush()
