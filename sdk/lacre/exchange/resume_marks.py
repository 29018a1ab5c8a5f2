"""Marks: how far an answer has come, told with its events, so that whoever read so far can have it gone on with elsewhere.

A client that can resume sends `lacre-resume: ?1` inside the seal. A worker that can, names its model's digest in a header of
the answer and gives each event of text the SSE field `id`, which readers of OpenAI's format pass over:

    id: PROMPT.CACHED.COUNT:TOKEN,TOKEN

COUNT tokens of the answer were sampled so far, of this request; those after the colon are new since the last mark. The text of
all events up to a mark is what the tokens up to it let out: what they hold back (half a code point, the beginning of a stop
string) is said by a later event, on whichever worker. What comes after the last mark says that the answer is over, and no more
that counts.
`docs/wire.md` section 11.2 is the same in full.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from lacre.errors import InvalidMessage

ASK: Final = "lacre-resume"  # a field of the inner request
YES: Final = "?1"  # its value (RFC 9651)
DIGEST: Final = "lacre-model-digest"  # a field of the inner response
MEMBER: Final = "resume"  # of the body of the request that goes on

_MARK: Final = re.compile(r"(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.([1-9]\d{0,9}):(\d{1,9}(?:,\d{1,9})*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mark:
    """prompt, cached, count: tokens of this request so far. tokens: ids of those sampled since the mark before."""

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
