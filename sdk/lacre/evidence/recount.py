"""Counts the tokens of an answer again, to compare them with its receipt. It needs no network.

It can show that a receipt claims tokens of which no byte arrived, or more than the model's tokenizer makes of the text. It
cannot show that the named model did the work. Nor can it count the prompt's tokens, because the template is the worker's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lacre.errors import UsageError
from lacre.runtime import arguments

Tokenizer = Callable[[str], int]

# Members of a message or delta whose text the model did not write.
_NOT_WRITTEN = frozenset({"role", "id", "type"})


@dataclass(frozen=True, slots=True)
class Recount:
    """Tokens of the answer, over all choices: as the receipt claims them, and as the client can count them.

    claimed: the receipt's count. text_bytes: the UTF-8 bytes of everything that the answer says; a token of text has at least
    one. listed: the tokens that the answer lists, if `logprobs` was requested: the worker's own claim, but each has its bytes.
    counted: the count of the caller's tokenizer for the text.
    """

    claimed: int
    text_bytes: int
    listed: int | None = None
    counted: int | None = None

    @property
    def unexplained(self) -> int:
        """Claimed tokens for which there is not even a byte of text. A few are honest: a stop sequence is cut off, a control
        token has no text, and a tool call has marks around it. A worker that invents many is noticed here.
        """
        return max(0, self.claimed - self.text_bytes)

    @property
    def difference(self) -> int | None:
        """Claimed tokens minus counted ones. Honestly 0 or little more: beside the cases in `unexplained`, a model may use more
        tokens for a text than its tokenizer would. None without a tokenizer.
        """
        return None if self.counted is None else self.claimed - self.counted


class Written:
    """What the model wrote, choice by choice, from a whole message or from its deltas."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._listed: int | None = None

    def add(self, choice: Mapping[str, Any], part: Mapping[str, Any]) -> None:
        """part: the choice's `message` or `delta`. Raises TypeError or AttributeError if it is not a choice."""
        self._texts.setdefault(choice.get("index", 0), []).extend(_strings(part))
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
            self._listed = (self._listed or 0) + len(logprobs["content"])

    def recount(self, claimed: int, tokenizer: Tokenizer | None) -> Recount:
        """claimed: tokens of the answer."""
        if tokenizer is not None:
            arguments.function(tokenizer, "tokenizer")
        texts = ["".join(parts) for parts in self._texts.values()]
        return Recount(
            claimed=claimed,
            text_bytes=sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
            listed=self._listed,
            counted=None if tokenizer is None else sum(_counted(tokenizer(text)) for text in texts),
        )


def _counted(tokens: object) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise UsageError(f"tokenizer: it must return a number of tokens, and returned {arguments.kind_of(tokens)}")
    return tokens


def _strings(part: object) -> Iterator[str]:
    """Every text in it, in order: the content, a refusal, the reasoning, and the names and arguments of tool calls."""
    waiting = [part]  # instead of recursion, which a hostile worker could make too deep
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            twice = {"reasoning"} if "reasoning_content" in value else set()  # two names of one text
            waiting += [value[name] for name in reversed(value) if name not in _NOT_WRITTEN and name not in twice]
        elif isinstance(value, list):
            waiting += reversed(value)
