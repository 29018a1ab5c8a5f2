"""Marks: an answer's events say how far it has come, so that a client can resume it on another worker.

A client that can resume sends `lacre-resume: ?1` inside the seal. A worker that can names its model's digest in a header of the
answer, and the answer's own in another. It also gives events the SSE field `id`, which readers of these APIs ignore:

    id: PROMPT.CACHED.COUNT:TOKEN,TOKEN

COUNT tokens of the answer to this request were sampled so far; the tokens after the colon are new since the last mark. All
events up to a mark hold the reasoning, text and calls of the tokens up to it. Tokens can hold back half a code point, or the
beginning of a stop string or of a call: a later event has it, from the same worker or another. Of the events that one token
makes, the last has the mark. `docs/wire.md` section 11.2 is the specification.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from lacre.errors import InvalidMessage

ASK: Final = "lacre-resume"  # a header of the inner request
YES: Final = "?1"  # its value (RFC 9651)
DIGEST: Final = "lacre-model-digest"  # a header of the inner response
ANSWER: Final = "lacre-answer"  # another one: the answer's name, which goes back to the worker that continues it
MEMBER: Final = "resume"  # a member of the resuming request's body

_MARK: Final = re.compile(r"(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.([1-9]\d{0,9}):(\d{1,9}(?:,\d{1,9})*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mark:
    """prompt, cached, count: tokens of this request so far. tokens: ids of the tokens sampled since the last mark."""

    prompt: int
    cached: int
    count: int
    tokens: Sequence[int] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.prompt}.{self.cached}.{self.count}:{','.join(map(str, self.tokens))}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """Raises InvalidMessage."""
        found = _MARK.fullmatch(text)
        if found is None:
            raise InvalidMessage("an event's id is not a mark")
        return cls(int(found[1]), int(found[2]), int(found[3]), [int(token) for token in found[4].split(",")])
