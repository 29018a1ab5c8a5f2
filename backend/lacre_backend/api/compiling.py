"""Compiles a request's grammar, outside the event loop.

Rules:
- Analysing and compiling a schema may take some tenths of a second, within the limits of both. It never runs on an event loop,
  and only a few run at a time. The rest wait. Nothing is compiled for a caller that has left.
- The grant's pseudonyms decide who is next, as in the engine. Each caller compiles one at a time, so its schemas, however many
  and costly, leave a thread to the others.
- Nothing is kept for another request: the time to compile would reveal what others have compiled.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import Generate
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.thoughts import AnswerForm
from lacre_backend.engine.protocol import Engine, Grammar, GrammarTooLarge, TaskRefused
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue

AT_ONCE: Final = 2  # one large schema does not delay all others; more would take the cores from the model


class _Job:
    """One request's grammar, from waiting to the end."""

    def __init__(self, fair: Fair, work: Callable[[], Grammar | None]) -> None:
        self.id = secrets.token_hex(8)
        self.fair = fair
        self.work = work
        self.outcome: Future[Grammar | None] = Future()
        self.waits = True


class Compiler:
    """Compiles the grammars of an app's requests. Any event loop may call it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammars")
        self._lock = threading.Lock()  # for the fields below
        self._turns: FairQueue[_Job] = FairQueue()
        self._running: list[Fair] = []

    async def grammar(
        self,
        engine: Engine,
        request: Generate,
        form: AnswerForm,
        fair: Fair = NOBODY,
        begun: tuple[int, ...] | None = None,
    ) -> Grammar | None:
        """None for an answer without a grammar. fair: whose turn it uses. begun: the answer so far, instead of the request's.

        Raises `RequestRefused`.
        """
        if not request.held:
            return None
        job = _Job(fair, partial(compiled, engine, request, form, request.begun if begun is None else begun))
        with self._lock:
            self._turns.add(fair, job.id, job)
            self._begin()
        try:
            return await asyncio.wrap_future(job.outcome)
        finally:
            with self._lock:
                if job.waits:  # the caller has left
                    self._turns.drop(fair, job.id)

    def _begin(self) -> None:
        """Starts as many jobs as may run now. Call it with the lock."""
        while len(self._running) < AT_ONCE:
            job = self._turns.next()
            if job is None or job.fair in self._running:  # callers without a running job come first, so no one else waits
                return
            self._turns.take(job.fair, job.id, hold=True)
            self._running.append(job.fair)
            job.waits = False
            self._pool.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        began = time.monotonic()
        try:
            if job.outcome.set_running_or_notify_cancel():
                _carry_out(job)
        finally:
            with self._lock:
                self._turns.spend(job.fair, int((time.monotonic() - began) * 1e6))
                self._turns.release(job.fair)
                self._running.remove(job.fair)
                self._begin()


def _carry_out(job: _Job) -> None:
    try:
        grammar = job.work()
    except BaseException as error:  # noqa: BLE001 - any error belongs to the waiting caller, as in any executor
        job.outcome.set_exception(error)
    else:
        job.outcome.set_result(grammar)


def compiled(engine: Engine, request: Generate, form: AnswerForm, begun: tuple[int, ...] = ()) -> Grammar | None:
    """begun: the tokens of the answer so far. Raises `RequestRefused`."""
    grammars = Grammars()
    source = request.grammar(form, grammars)
    if source is None:
        return None
    try:
        return engine.grammar(source, begun)
    except GrammarTooLarge:
        if not grammars.loose:
            raise grammars.too_large() from None
    except TaskRefused as refusal:
        raise _refused(refusal) from None
    grammars = Grammars(loosely=True)  # for functions that are not strict, the model decides what cannot be enforced
    source = request.grammar(form, grammars) or ""
    try:
        return engine.grammar(source, begun)
    except GrammarTooLarge:
        raise grammars.too_large() from None
    except TaskRefused as refusal:
        raise _refused(refusal) from None


def _refused(refusal: TaskRefused) -> RequestRefused:
    return RequestRefused(str(refusal), param="resume.tokens" if refusal.field == "begun" else "response_format")
