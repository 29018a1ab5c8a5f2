"""Calls as a model writes them in each format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.gemma import GemmaCalls
from lacre_backend.api.tools.harmony import HARMONY_CALLS
from lacre_backend.api.tools.pythonic import PythonicCalls
from lacre_backend.api.tools.tagged import TaggedFormat

Call = tuple[str, dict[str, Any]]
SAMPLES: Final = {  # of what stands before or behind a name or the arguments
    "[0-9]{1,3}": "0",
    ":[0-9]{1,3}": ":0",
    r"\[CALL_ID\][a-zA-Z0-9]{9}": "[CALL_ID]a1B2c3D4e",
    r', "id": "[a-zA-Z0-9]{9}"': ', "id": "a1B2c3D4e"',
    r', "id": "[a-zA-Z0-9_-]{1,40}"': ', "id": "call_0-x"',
    "": "",
}


def once(form: CallFormat) -> bool:
    """Whether an answer has one call."""
    return form.once or form is HARMONY_CALLS


def alone(form: CallFormat) -> bool:
    """Whether calls are the whole answer."""
    return form.marker is None and form is not HARMONY_CALLS


def written(form: CallFormat, calls: Sequence[Call], *, optional: bool = True) -> str:
    """optional: with what the model may leave out."""

    def one(name: str, arguments: Mapping[str, Any]) -> str:
        if isinstance(form, TaggedFormat | GemmaCalls | PythonicCalls):
            return form.told(name, arguments)
        lead = SAMPLES[form.lead] + form.named if form.lead else ""
        tag, tail = (SAMPLES[form.tag], SAMPLES[form.tail]) if optional else ("", "")
        sent = json.dumps(arguments, ensure_ascii=False)
        return f"{form.open}{lead}{name}{tag}{form.middle}{sent}{tail}{form.close}"

    return form.begin + form.between.join(one(*call) for call in calls) + form.end
