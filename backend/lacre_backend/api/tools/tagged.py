"""Formats of calls that write each argument between tags: Qwen3-Coder, Seed-OSS, GLM, MiniMax, DeepSeek, Hunyuan.

Rules:
- A text argument stands as it is. Other arguments are JSON. The function's schema says which is which.
- What clients get is JSON, as from any other format. An argument comes out when it is whole.
- The arguments come in the order of the schema's properties. There are no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pydantic_core

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars, literal
from lacre_backend.api.tools.format import START, AnswerPlace, CallFormat, in_pattern
from lacre_backend.api.tools.parts import Argued, Part
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.request import Calling, Function

# What a schema of a text may say without limiting it.
_UNLIMITED: Final = frozenset({"type", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})
_SHARED: Final = ("$defs", "definitions")  # what references lead to


@dataclass(frozen=True, slots=True)
class TaggedFormat(CallFormat):
    """A call is `open` name `middle`, each argument, `close`. An argument is `key_open` name
    `key_close` value `value_close`.

    of_text, of_json: what some formats write between name and `key_close`, to say what the value is.
    """

    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    of_text: str = ""
    of_json: str = ""

    def shows(self, name: str, arguments: Mapping[str, Any], text: str) -> bool:
        return self.begin + self.told(name, arguments) + self.end in text

    @property
    def literals(self) -> tuple[str, ...]:
        around = (self.begin, self.open, self.middle, self.close, self.between, self.end)
        return (*around, self.key_open, self.key_close, self.value_close, *self.markers)

    def told(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model writes it."""
        told = "".join(
            self._key(key, text=isinstance(each, str)) + _value(each) + self.value_close for key, each in arguments.items()
        )
        return f"{self.open}{name}{self.middle}{told}{self.close}"

    def _key(self, key: str, *, text: bool) -> str:
        return f"{self.key_open}{key}{self.of_text if text else self.of_json}{self.key_close}"

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        schema = function.arguments()
        required = schema.get("required") or ()
        terms = [literal(function.name + self.middle)]
        for key, each in properties(schema).items():
            value = self._value_of(grammars, schema, each, f"tools[{i}].function.parameters", strict=bool(function.strict))
            written = f"{literal(self._key(key, text=is_text(each)))} {value}"
            terms.append(written if key in required else f"({written})?")
        return f"({' '.join(terms)})"

    def _value_of(self, grammars: Grammars, root: Mapping[str, Any], schema: Any, param: str, *, strict: bool) -> str:
        """The terms of a value and the tag behind it."""
        if not is_text(schema):
            return f"{value_rule(grammars, root, schema, param, strict=strict)} {literal(self.value_close)}"
        if among := choices(schema):
            return f"({' | '.join(literal(str(each) + self.value_close) for each in among)})"
        unenforced(schema, param, strict=strict)
        return "plain_value"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        rules = CallFormat.grammar(self, grammars, calling, speech, at)
        return f"{rules}plain_value[lazy]: /(?s:.*){in_pattern(self.value_close)}/\n" if "plain_value" in rules else rules


def value_rule(grammars: Grammars, root: Mapping[str, Any], schema: Any, param: str, *, strict: bool) -> str:
    """The rule of a member's value as JSON. root: the schema that it is in. Raises `RequestRefused`."""
    if not isinstance(schema, dict):
        return grammars.any_object()
    return grammars.schema({name: root[name] for name in _SHARED if name in root} | schema, param, strict=strict)


def listed(members: Sequence[tuple[str, bool]], comma: str) -> str:
    """Terms of members in their order, with commas between those that are there. members: terms, and whether they must be."""
    ways = []
    for k, (first, must) in enumerate(members):
        following = (f"({literal(comma)} {term})" + ("" if needed else "?") for term, needed in members[k + 1 :])
        ways.append(" ".join([first, *following]))
        if must:
            break
    else:
        ways.append('""')
    return " | ".join(ways)


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of its members."""
    named = schema.get("properties")
    return named if isinstance(named, dict) else {}


def unenforced(schema: Mapping[str, Any], param: str, *, strict: bool) -> None:
    """Refuses limits of a text if the schema is strict: outside of JSON they are not enforced. Raises `RequestRefused`."""
    limits = sorted(schema.keys() - _UNLIMITED)
    if strict and not unlimited(schema):
        said = f"Invalid schema for {param}: this model's format of calls cannot enforce '{limits[0]}' of a text."
        raise RequestRefused(said, code="invalid_value", param=param)


def unlimited(schema: Mapping[str, Any]) -> bool:
    """Whether the schema of a text admits each text."""
    return schema.keys() <= _UNLIMITED


def is_text(schema: Any) -> bool:
    """Whether a value of this schema is a text."""
    if not isinstance(schema, dict) or schema.get("type", "string") != "string":
        return False
    listed = choices(schema)
    return "type" in schema or (bool(listed) and all(isinstance(each, str) for each in listed))


def choices(schema: Mapping[str, Any]) -> Sequence[Any]:
    """The values that the schema lists, if it does."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return listed if isinstance(listed, list) else ()


def texts_of(calling: Calling) -> dict[str, frozenset[str]]:
    """Each function's arguments that are texts."""
    return {
        function.name: frozenset(key for key, each in properties(function.arguments()).items() if is_text(each))
        for _, function in calling.callable
    }


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


QWEN_CODER: Final = TaggedFormat(
    open="<tool_call>\n<function=",
    middle=">\n",
    close="</function>\n</tool_call>",
    between="\n",
    marker="<tool_call>",
    markers=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    key_open="<parameter=",
    key_close=">\n",
    value_close="\n</parameter>\n",
)
SEED: Final = TaggedFormat(
    open="<seed:tool_call>\n<function=",
    middle=">\n",
    close="</function>\n</seed:tool_call>",
    between="\n",
    marker="<seed:tool_call>",
    markers=("<seed:tool_call>", "</seed:tool_call>"),
    key_open="<parameter=",
    key_close=">",
    value_close="</parameter>\n",
)
GLM: Final = TaggedFormat(
    open="<tool_call>",
    middle="\n",
    close="</tool_call>",
    between="\n",
    marker="<tool_call>",
    markers=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    key_open="<arg_key>",
    key_close="</arg_key>\n<arg_value>",
    value_close="</arg_value>\n",
)
GLM_CLOSE: Final = replace(  # 4.7, Spark, Laguna
    GLM, middle="", between="", key_close="</arg_key><arg_value>", value_close="</arg_value>"
)
MINIMAX: Final = TaggedFormat(  # M2
    begin="<minimax:tool_call>\n",
    open='<invoke name="',
    middle='">\n',
    close="</invoke>",
    between="\n",
    end="\n</minimax:tool_call>",
    marker="<minimax:tool_call>",
    markers=("<minimax:tool_call>", "</minimax:tool_call>"),
    key_open='<parameter name="',
    key_close='">',
    value_close="</parameter>\n",
)
DEEPSEEK_V3_2: Final = TaggedFormat(
    begin="<｜DSML｜function_calls>\n",
    open='<｜DSML｜invoke name="',
    middle='">\n',
    close="</｜DSML｜invoke>",
    between="\n",
    end="\n</｜DSML｜function_calls>",
    marker="<｜DSML｜function_calls>",
    markers=("｜DSML｜",),
    key_open='<｜DSML｜parameter name="',
    of_text='" string="true"',
    of_json='" string="false"',
    key_close=">",
    value_close="</｜DSML｜parameter>\n",
)
DEEPSEEK_V4: Final = replace(
    DEEPSEEK_V3_2, begin="<｜DSML｜tool_calls>\n", end="\n</｜DSML｜tool_calls>", marker="<｜DSML｜tool_calls>"
)
HY: Final = TaggedFormat(  # Hunyuan 3
    begin="<tool_calls:opensource>\n",
    open="<tool_call:opensource>",
    middle="<tool_sep:opensource>\n",
    close="</tool_call:opensource>",
    between="\n",
    end="\n</tool_calls:opensource>",
    marker="<tool_calls:opensource>",
    markers=("<tool_calls:opensource>", "</tool_calls:opensource>"),
    key_open="<arg_key:opensource>",
    key_close="</arg_key:opensource>\n<arg_value:opensource>",
    value_close="</arg_value:opensource>\n",
)
TAGGED: Final = (QWEN_CODER, SEED, GLM, GLM_CLOSE, MINIMAX, DEEPSEEK_V3_2, DEEPSEEK_V4, HY)


class TaggedReader(CallReader):
    """Parses one answer with such calls."""

    def __init__(self, form: TaggedFormat, seed: str, texts: Mapping[str, frozenset[str]]) -> None:
        """texts: each offered function's arguments that are texts."""
        super().__init__(form, frozenset(texts), seed)
        self._tagged = form
        self._texts = texts
        self._told: set[str] = set()

    def _arguments(self) -> Iterator[Part]:
        form, held = self._tagged, self._held.lstrip()
        if held.startswith(form.close):
            self._held, self._state = held, self._closing
            yield Argued(self._index, "}" if self._told else "{}")
            self._told = set()
        elif held.startswith(form.key_open):
            key, _, rest = held.removeprefix(form.key_open).partition(form.key_close)
            value, found, after = rest.partition(form.value_close)
            if found:
                self._held = after
                yield Argued(self._index, self._written(key, value))
        elif not any(mark.startswith(held) for mark in (form.close, form.key_open)):
            self._held, self._state = held, self._speech  # the model does not keep to its format
            yield Argued(self._index, "}" if self._told else "{}")
            self._told = set()

    def _written(self, key: str, value: str) -> str:
        before, form = ", " if self._told else "{", self._tagged
        said = (form.of_text and key.endswith(form.of_text)) or key.removesuffix(form.of_json) in self._texts[self._name]
        name = key.removesuffix(form.of_text).removesuffix(form.of_json)
        self._told.add(name)
        return f"{before}{json.dumps(name, ensure_ascii=False)}: {self._json(value, text=bool(said))}"

    def _json(self, value: str, *, text: bool) -> str:
        if not text:
            try:
                pydantic_core.from_json(value, allow_inf_nan=False)
            except ValueError:
                pass  # a text after all
            else:
                return value.strip()
        return json.dumps(value, ensure_ascii=False)
