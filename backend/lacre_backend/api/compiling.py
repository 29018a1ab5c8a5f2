"""From a request to its compiled grammar, beside the event loop.

Rules
- To take a schema apart and compile it may take some tenths of a second, within the limits of both. It never happens on an
  event loop, and for a few requests at a time. The rest wait; nothing is compiled for a caller that left meanwhile.
- Whose turn it is, the grant's pseudonyms decide, as in the engine. One caller has one at a time, so that its schemas, however
  many and dear, leave a thread to the others.
- Nothing is kept from one request for another: what another has compiled would show in the time it takes.
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
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.engine.protocol import Engine, Grammar, GrammarTooLarge, TaskRefused
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue

AT_ONCE: Final = 2  # one large schema does not hold up all others; more would take the cores from the model


class _Job:
    """One request's grammar, from its wait to its end."""

    def __init__(self, fair: Fair, work: Callable[[], Grammar | None]) -> None:
        self.id = secrets.token_hex(8)
        self.fair = fair
        self.work = work
        self.outcome: Future[Grammar | None] = Future()
        self.waits = True


class Compiler:
    """Compiles the grammars of an app's requests. Its methods may be called from any event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammars")
        self._lock = threading.Lock()  # of what follows
        self._turns: FairQueue[_Job] = FairQueue()
        self._running: list[Fair] = []

    async def grammar(self, engine: Engine, request: Generate, form: CallFormat, fair: Fair = NOBODY) -> Grammar | None:
        """None for an answer that is held to nothing. fair: whose turn it takes. Raises `RequestRefused`."""
        if not request.held:
            return None
        job = _Job(fair, partial(compiled, engine, request, form))
        with self._lock:
            self._turns.add(fair, job.id, job)
            self._begin()
        try:
            return await asyncio.wrap_future(job.outcome)
        finally:
            with self._lock:
                if job.waits:  # whoever asked has left
                    self._turns.drop(fair, job.id)

    def _begin(self) -> None:
        """With the lock: as many as may run now."""
        while len(self._running) < AT_ONCE:
            job = self._turns.next()
            if job is None or job.fair in self._running:  # those with nothing under way come first: nobody else waits
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
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs to whoever waits, as in any executor
        job.outcome.set_exception(error)
    else:
        job.outcome.set_result(grammar)


def compiled(engine: Engine, request: Generate, form: CallFormat) -> Grammar | None:
    """form: how the model writes calls. Raises `RequestRefused`."""
    grammars = Grammars()
    source = request.grammar(form, grammars)
    if source is None:
        return None
    try:
        return engine.grammar(source, request.begun)
    except GrammarTooLarge:
        if not grammars.loose:
            raise grammars.too_large() from None
    except TaskRefused as refusal:
        raise _refused(refusal) from None
    grammars = Grammars(loosely=True)  # of functions that are not strict, what cannot be enforced is left to the model
    source = request.grammar(form, grammars) or ""
    try:
        return engine.grammar(source, request.begun)
    except GrammarTooLarge:
        raise grammars.too_large() from None
    except TaskRefused as refusal:
        raise _refused(refusal) from None


def _refused(refusal: TaskRefused) -> RequestRefused:
    return RequestRefused(str(refusal), param="resume.tokens" if refusal.field == "begun" else "response_format")
