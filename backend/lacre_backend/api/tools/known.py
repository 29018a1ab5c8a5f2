"""The formats of calls that models were trained on, and the parser of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lacre_backend.api.tools.format import FORMATS, CallFormat
from lacre_backend.api.tools.gemma import GEMMA, GemmaCalls, GemmaReader
from lacre_backend.api.tools.harmony import HARMONY_CALLS
from lacre_backend.api.tools.pythonic import LFM, PYTHONIC, PythonicCalls, PythonicReader
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.recipients import FUNCTIONARY_3_2
from lacre_backend.api.tools.request import Calling
from lacre_backend.api.tools.tagged import TAGGED, TaggedFormat, TaggedReader, texts_of

KNOWN_CALLS: Final = (*FORMATS, *TAGGED, GEMMA, HARMONY_CALLS, LFM, PYTHONIC, FUNCTIONARY_3_2)


def shown(name: str, arguments: Mapping[str, Any], rendered: str) -> CallFormat | None:
    """The format in which a template wrote this call, if one of them is it."""
    return next((form for form in KNOWN_CALLS if form.shows(name, arguments, rendered)), None)


def call_reader(form: CallFormat, calling: Calling, seed: str, *, speaking: bool) -> CallReader:
    """calling: what the request offers. seed: of the ids of calls. speaking: whether the answer goes on inside its text.

    Not for Harmony and Functionary 3.2, whose answers consist of messages.
    """
    if isinstance(form, TaggedFormat):
        return TaggedReader(form, seed, texts_of(calling))
    names = [function.name for _, function in calling.callable]
    if isinstance(form, GemmaCalls):
        return GemmaReader(form, names, seed)
    kind = PythonicReader if isinstance(form, PythonicCalls) else CallReader
    return kind(form, names, seed, speaking=speaking)
