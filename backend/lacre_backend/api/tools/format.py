"""The models' formats of function calls: as a grammar for an answer, and as text of earlier turns.

Rules:
- A format is a value of `CallFormat`. Everything else here is the same for all formats.
- With the grammar each call is complete and valid: an offered function, and arguments that its schema allows. If the model may
  also write text, the text is free up to the marker of a call, which no text can contain.
- `reader.py` parses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import NOTHING, Grammars, literal
from lacre_backend.api.tools.request import Calling, Function

MAX_CALLS: Final = 16  # in one answer: a small model may not stop by itself


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A call is `open` name `middle` arguments `close`; further calls may follow after `between`.

    marker: the beginning of `open` that identifies a call anywhere in text. None if only the answer's first character does, and
    the answer is one call. markers: literals that vocabularies have as their own tokens, which steer the model.
    """

    open: str
    middle: str
    close: str
    between: str = ""
    marker: str | None = None
    markers: tuple[str, ...] = ()

    def written(self, name: str, arguments: str) -> str:
        """A call as the model writes it."""
        return f"{self.open}{name}{self.middle}{arguments}{self.close}"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, *, rule: str = "start") -> str:
        """The rules of an answer, with `rule` for the whole. speech: the rule of an answer without a call; None for any text.

        Raises `RequestRefused`.
        """
        lines = [f"body: {' | '.join(self._call_of(grammars, i, function) for i, function in calling.callable)}"]
        more = calling.many and self.marker is not None
        lines.append(f"call: {literal(self.open)} body {literal(self.close)}")
        following = f"({literal(self.between)} call){{0,{MAX_CALLS - 1}}}" if more else ""
        if calling.required:
            lines.append(f"{rule}: call {following}")
        elif speech is not None:
            if self.marker is None:
                # Its calls may begin like JSON text, and the difference shows too late.
                said = "This model cannot choose between a call and JSON text. Omit 'response_format', or require a call."
                raise RequestRefused(said, code="unsupported_value", param="response_format")
            lines.append(f"{rule}: {speech} | call {following}")
        elif self.marker is None:
            lines += [f"{rule}: TEXT | call | {NOTHING}", f"TEXT: /[^{in_pattern(self.open[0])}]/ /(?s:.*)/"]
        else:
            rest = literal(self.open.removeprefix(self.marker))
            lines += [
                f"{rule}: TEXT | marked {rest} body {literal(self.close)} {following} | {NOTHING}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){in_pattern(self.marker)}(?s:.*)/",
                f"marked[lazy]: /(?s:.*){in_pattern(self.marker)}/",
            ]
        return "\n".join(lines) + "\n"

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        arguments = grammars.schema(_arguments(function, i), _param(i), strict=bool(function.strict))
        return f"{literal(function.name + self.middle)} {arguments}"


# Qwen, Hermes, and the format that the fallback teaches other models
HERMES: Final = CallFormat(
    open='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between="\n",
    marker="<tool_call>",
    markers=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"),
)
LLAMA: Final = CallFormat(open='{"name": "', middle='", "parameters": ', close="}")
FORMATS: Final = (HERMES, LLAMA)


def _param(i: int) -> str:
    return f"tools[{i}].function.parameters"


def _arguments(function: Function, i: int) -> dict[str, object]:
    """The schema of the arguments, which must be an object."""
    schema = function.arguments()
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestRefused(
            f"Invalid schema for {_param(i)}: arguments are an object, so its type must be.",
            code="invalid_value",
            param=_param(i),
        )
    return {**schema, "type": "object"}


def in_pattern(text: str) -> str:
    """A text in a regular expression."""
    return "".join(f"\\u{{{ord(character):X}}}" for character in text)
