"""Formats of calls that write each argument between tags: Qwen3-Coder, Seed-OSS, GLM, MiniMax.

Rules:
- A text argument stands as it is. Other arguments are JSON. The function's schema says which is which.
- What clients get is JSON, as from any other format. An argument comes out when it is whole.
- The arguments come in the order of the schema's properties. There are no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars, literal
from lacre_backend.api.tools.format import CallFormat, in_pattern
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
    """

    key_open: str = ""
    key_close: str = ""
    value_close: str = ""

    def shows(self, name: str, arguments: str, text: str) -> bool:
        return self.told(name, json.loads(arguments)) in text

    def told(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model writes it."""
        told = "".join(
            self.key_open + key + self.key_close + _value(each) + self.value_close for key, each in arguments.items()
        )
        return f"{self.open}{name}{self.middle}{told}{self.close}"

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        schema = function.arguments()
        required = schema.get("required") or ()
        terms = [literal(function.name + self.middle)]
        for key, each in properties(schema).items():
            value = self._value_of(grammars, schema, each, f"tools[{i}].function.parameters", strict=bool(function.strict))
            written = f"{literal(self.key_open + key + self.key_close)} {value}"
            terms.append(written if key in required else f"({written})?")
        return f"({' '.join(terms)})"

    def _value_of(self, grammars: Grammars, root: Mapping[str, Any], schema: Any, param: str, *, strict: bool) -> str:
        """The terms of a value and the tag behind it."""
        if not is_text(schema):
            shared = {name: root[name] for name in _SHARED if name in root}
            whole = {**shared, **schema} if isinstance(schema, dict) else schema
            rule = grammars.schema(whole, param, strict=strict) if isinstance(whole, dict) else grammars.any_object()
            return f"{rule} {literal(self.value_close)}"
        if listed := choices(schema):
            return f"({' | '.join(literal(str(each) + self.value_close) for each in listed)})"
        unenforced(schema, param, strict=strict)
        return "plain_value"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, *, rule: str = "start") -> str:
        rules = CallFormat.grammar(self, grammars, calling, speech, rule=rule)
        return f"{rules}plain_value[lazy]: /(?s:.*){in_pattern(self.value_close)}/\n" if "plain_value" in rules else rules


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of its members."""
    named = schema.get("properties")
    return named if isinstance(named, dict) else {}


def unenforced(schema: Mapping[str, Any], param: str, *, strict: bool) -> None:
    """Refuses limits of a text if the schema is strict: outside of JSON they are not enforced. Raises `RequestRefused`."""
    limits = sorted(schema.keys() - _UNLIMITED)
    if strict and limits:
        said = f"Invalid schema for {param}: this model's format of calls cannot enforce '{limits[0]}' of a text."
        raise RequestRefused(said, code="invalid_value", param=param)


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
TAGGED: Final = (QWEN_CODER, SEED, GLM)


class TaggedReader(CallReader):
    """Parses one answer with such calls."""

    def __init__(self, form: TaggedFormat, seed: str, texts: Mapping[str, frozenset[str]]) -> None:
        """texts: each function's arguments that are texts."""
        super().__init__(form, seed)
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
        before = ", " if self._told else "{"
        self._told.add(key)
        return f"{before}{json.dumps(key, ensure_ascii=False)}: {self._json(key, value)}"

    def _json(self, key: str, value: str) -> str:
        if key not in self._texts.get(self._name, frozenset()):
            try:
                pydantic_core.from_json(value, allow_inf_nan=False)
            except ValueError:
                pass  # a text after all
            else:
                return value.strip()
        return json.dumps(value, ensure_ascii=False)
