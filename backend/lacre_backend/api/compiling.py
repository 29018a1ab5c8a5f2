"""From a request to its compiled grammar, beside the event loop.

Rules
- To take a schema apart and compile it may take some tenths of a second, within the limits of both. It never happens on an
  event loop, and for a few requests at a time. The rest wait; nothing is compiled for a caller that left meanwhile.
- Nothing is kept from one request for another: what another has compiled would show in the time it takes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from lacre_backend.api.calls import CallFormat
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import Generate
from lacre_backend.api.schema import Grammars
from lacre_backend.engine.protocol import Engine, Grammar, GrammarTooLarge, TaskRefused

AT_ONCE: Final = 2  # one large schema does not hold up all others; more would take the cores from the model


class Compiler:
    """Compiles the grammars of an app's requests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammars")

    async def grammar(self, engine: Engine, request: Generate, form: CallFormat) -> Grammar | None:
        """None for an answer that is held to nothing. Raises `RequestRefused`."""
        if not request.held:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, compiled, engine, request, form)


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
