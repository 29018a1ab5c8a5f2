"""The models' formats of function calls: as a grammar for an answer, and as text of earlier turns.

Rules:
- A format is a value of `CallFormat`. Everything else here is the same for all formats.
- With the grammar each call is complete and valid: an offered function, and arguments that its schema allows. If the model may
  also write text, the text is free up to the marker of a call, which no text can contain.
- `reader.py` parses them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import NOTHING, Grammars, literal
from lacre_backend.api.tools.request import Calling, Function

MAX_CALLS: Final = 16  # in one answer: a small model may not stop by itself


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """Where an answer's rules stand in a grammar.

    rule: the name of the rule for the whole. speaking: whether the answer goes on inside its text. opened: the pattern of what
    begins reasoning, if no text may begin with it.
    """

    rule: str = "start"
    speaking: bool = False
    opened: str = ""

    @property
    def text(self) -> str:
        """What limits the pattern of a text."""
        return f" & ~/{self.opened}(?s:.*)/" if self.opened else ""


START: Final = AnswerPlace()


@dataclass(frozen=True, slots=True)
class CallFormat:
    """Calls are `begin`, the calls with `between` in the middle, `end`. A call is `open` name `middle` arguments `close`.

    - lead, named: of a format in which something stands before the name: its pattern, and the mark behind it.
    - tag, tail: patterns of what models may write between name and `middle`, and between arguments and `close`.
    - marker: the beginning of `begin` and `open` that identifies a call anywhere in text. None if only the answer's first
      character does, and nothing but calls follows it.
    - once: whether an answer has one call.
    - answer: what the model writes before an answer that is text.
    - markers: literals that vocabularies have as their own tokens, which steer the model.
    - short_ids: whether the template takes no ids but those of nine letters and digits.
    """

    open: str
    middle: str
    close: str
    between: str = ""
    marker: str | None = None
    markers: tuple[str, ...] = ()
    begin: str = ""
    end: str = ""
    tag: str = ""
    tail: str = ""
    short_ids: bool = False
    lead: str = ""
    named: str = ""
    once: bool = False
    answer: str = ""

    def written(self, name: str, arguments: str) -> str:
        """A call as the model writes it, without optional parts."""
        return f"{self.open}{name}{self.middle}{arguments}{self.close}"

    def shows(self, name: str, arguments: Mapping[str, Any], text: str) -> bool:
        """Whether a template has written this call in `text`. Some write no `end` behind a single call."""
        head, rest = re.escape(self.begin + self.open), re.escape(self.middle + json.dumps(arguments))
        said = f"{self.lead}{re.escape(self.named + name)}(?:{self.tag})?"
        return re.search(f"{head}{said}{rest}(?:{self.tail})?{re.escape(self.close)}", text) is not None

    @property
    def literals(self) -> tuple[str, ...]:
        """The texts in which this format's marks are."""
        return (self.begin, self.open, self.named, self.middle, self.close, self.between, self.end, *self.markers)

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        """The rules of an answer. speech: the rule of one without a call; None for any text. Raises `RequestRefused`."""
        rule = at.rule
        lines = [f"body: {' | '.join(self._call_of(grammars, i, function) for i, function in calling.callable)}"]
        rest = _joined(self._tail, self.close)
        lines.append(f"call: {_joined('', self.open)} body {rest}")
        begin, end = _joined("", self.begin), _joined("", self.end)
        # One literal, because `end` may begin like `between`.
        following = self.more(calling, f"{_joined('', self.between + self.open)} body {rest}") + f" {end}"
        if calling.required:
            lines.append(f"{rule}: {begin} call {following}")
        elif speech is not None:
            if self.marker is None:
                # Its calls may begin like JSON text, and the difference shows too late.
                said = "This model cannot choose between a call and JSON text. Omit 'response_format', or require a call."
                raise RequestRefused(said, code="unsupported_value", param="response_format")
            lines.append(f"{rule}: {speech} | {begin} call {following}")
        elif self.marker is None and at.speaking:
            lines = [f"{rule}: TEXT", "TEXT: /(?s:.*)/"]
        elif self.marker is None:
            first = in_pattern((self.begin + self.open)[0])
            lines += [f"{rule}: TEXT | {begin} call {following} | {NOTHING}", f"TEXT: /[^{first}](?s:.*)/{at.text}"]
        else:
            opened = _joined("", (self.begin + self.open).removeprefix(self.marker))
            lines += [
                f"{rule}: TEXT | marked {opened} body {rest} {following} | {NOTHING}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){in_pattern(self.marker)}(?s:.*)/{at.text}",
                f"marked[lazy]: /(?s:.*){in_pattern(self.marker)}/{at.text}",
            ]
        return "\n".join(lines) + "\n"

    def more(self, calling: Calling, call: str) -> str:
        """The terms of further calls, if an answer may have them."""
        return f"({call}){{0,{MAX_CALLS - 1}}}" if calling.many and not self.once else ""

    @property
    def _tail(self) -> str:
        return f"/{self.tail}/?" if self.tail else ""

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        arguments = grammars.schema(_arguments(function, i), _param(i), strict=bool(function.strict))
        lead = f"/{self.lead}/ {literal(self.named)} " if self.lead else ""
        if not self.tag:
            return f"{lead}{literal(function.name + self.middle)} {arguments}"
        return f"{lead}{literal(function.name)} /{self.tag}/? {literal(self.middle)} {arguments}"


def _joined(pattern: str, text: str) -> str:
    """Terms of a rule: a pattern's, and a literal if there is text."""
    return " ".join([*([pattern] if pattern else []), *([literal(text)] if text else [])])


# Qwen, Hermes, and the format that the fallback teaches other models
HERMES: Final = CallFormat(
    open='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between="\n",
    marker="<tool_call>",
    markers=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"),
)
LLAMA: Final = CallFormat(open='{"name": "', middle='", "parameters": ', close="}", once=True)
MISTRAL: Final = CallFormat(  # Small 3.2, Devstral, Magistral, Ministral 3
    open="[TOOL_CALLS]",
    tag=r"\[CALL_ID\][a-zA-Z0-9]{9}",
    middle="[ARGS]",
    close="",
    marker="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    short_ids=True,
)
MISTRAL_LIST: Final = CallFormat(  # Nemo and others of 2024
    begin="[TOOL_CALLS][",
    open='{"name": "',
    middle='", "arguments": ',
    tail=r', "id": "[a-zA-Z0-9]{9}"',
    close="}",
    between=", ",
    end="]",
    marker="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    short_ids=True,
)
MISTRAL_SPACED: Final = replace(MISTRAL_LIST, begin="[TOOL_CALLS] [")  # 7B v0.3, Mixtral 8x22B
_DEEPSEEK: Final = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
DEEPSEEK: Final = CallFormat(  # V3 and R1
    begin=_DEEPSEEK[0],
    open=f"{_DEEPSEEK[2]}function{_DEEPSEEK[4]}",
    middle="\n```json\n",
    close=f"\n```{_DEEPSEEK[3]}",
    between="\n",
    end=_DEEPSEEK[1],
    marker=_DEEPSEEK[0],
    markers=_DEEPSEEK,
)
DEEPSEEK_V3_1: Final = CallFormat(
    begin=_DEEPSEEK[0],
    open=_DEEPSEEK[2],
    middle=_DEEPSEEK[4],
    close=_DEEPSEEK[3],
    end=_DEEPSEEK[1],
    marker=_DEEPSEEK[0],
    markers=_DEEPSEEK,
)
KIMI: Final = CallFormat(  # K2
    begin="<|tool_calls_section_begin|>",
    open="<|tool_call_begin|>functions.",
    tag=":[0-9]{1,3}",
    middle="<|tool_call_argument_begin|>",
    close="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
    marker="<|tool_calls_section_begin|>",
    markers=(
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
        "<|tool_call_argument_begin|>",
    ),
)
FUNCTIONARY: Final = CallFormat(  # 3.1, and Llama's own form of it
    open="<function=", middle=">", close="</function>", marker="<function="
)
APERTUS: Final = CallFormat(
    begin="<|tools_prefix|>[",
    open='{"',
    middle='": ',
    close="}",
    between=", ",
    end="]<|tools_suffix|>",
    marker="<|tools_prefix|>",
    markers=("<|tools_prefix|>", "<|tools_suffix|>"),
)
_NAMED: Final = CallFormat(open='{"name": "', middle='", "arguments": ', close="}")
APRIEL: Final = replace(
    _NAMED,
    begin="<tool_calls>[",
    tail=r', "id": "[a-zA-Z0-9_-]{1,40}"',
    between=", ",
    end="]</tool_calls>",
    marker="<tool_calls>",
    markers=("<tool_calls>", "</tool_calls>"),
)
MINIMAX_M1: Final = replace(
    _NAMED,
    begin="<tool_calls>\n",
    between="\n",
    end="\n</tool_calls>",
    marker="<tool_calls>",
    markers=("<tool_calls>", "</tool_calls>"),
)
NEMOTRON: Final = replace(  # Nano 2
    _NAMED,
    begin="<TOOLCALL>[",
    between=", ",
    end="]</TOOLCALL>",
    marker="<TOOLCALL>",
    markers=("<TOOLCALL>", "</TOOLCALL>", "<TOOL_RESPONSE>", "</TOOL_RESPONSE>"),
)
GIGACHAT: Final = replace(  # 3.1
    _NAMED,
    open='<|function_call|>{"name": "',
    marker="<|function_call|>",
    markers=("<|function_call|>",),
    once=True,
)
COMMAND: Final = CallFormat(  # R7B, A and later ones
    begin="<|START_ACTION|>[\n    ",
    open='{"tool_call_id": "',
    lead="[0-9]{1,3}",
    named='", "tool_name": "',
    middle='", "parameters": ',
    close="}",
    between=",\n    ",
    end="\n]<|END_ACTION|>",
    marker="<|START_ACTION|>",
    markers=("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
)
FORMATS: Final = (
    *(HERMES, LLAMA, MISTRAL, MISTRAL_LIST, MISTRAL_SPACED, DEEPSEEK, DEEPSEEK_V3_1, KIMI, FUNCTIONARY),
    *(APERTUS, APRIEL, MINIMAX_M1, NEMOTRON, GIGACHAT, COMMAND),
)


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
