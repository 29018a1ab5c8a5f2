"""The environment of a chat template: the same as in Hugging Face's `apply_chat_template`, for which templates are written.

Rules:
- The same extensions, filters and globals, with the same parameters in the same order. tests/heavy/templates compares the two.
- What transformers does not have is missing here too: a template that needs it fails in both.
- Everything keeps the limits of `template.bounds`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from lacre_backend.api.template.bounds import BoundedEnvironment, Bounds, make_room, weight

# How many characters JSON may make of one: `\u0000`, or two such escapes for a character beyond the basic plane in ASCII.
_ESCAPED: Final = 6
_ESCAPED_ASCII: Final = 12


# Names of an assistant's reasoning; the first is the usual one.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class Raised(jinja2.TemplateError):
    """The template called `raise_exception`. The text is the template's own, for the caller."""


class _Generation(Extension):
    """`{% generation %}` marks an assistant's text, for training. A prompt contains just its content.

    As in transformers it is a call with a body: names that are set inside are unknown after it.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the type's other features."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Rejects names that begin with an underscore: Python and Jinja call some of them outside of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # its content may be of any size


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("A namespace takes no name that begins with an underscore.")


def _raise_exception(message: object) -> NoReturn:
    raise Raised(message if isinstance(message, str) else f"it raises a {type(message).__name__}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    weighed = weight(value)
    beside = sum(map(len, separators or (", ", ": ")))
    inward = (len(indent) if isinstance(indent, str) else max(int(indent or 0), 0)) * weighed.depth
    escaped = _ESCAPED_ASCII if ensure_ascii else _ESCAPED
    make_room(weighed.characters * escaped + weighed.values * (beside + inward + 1))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def given(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as transformers passes it: no null members, and reasoning under the names that templates read."""
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def template_environment(bounds: Bounds | None = None) -> BoundedEnvironment:
    environment = BoundedEnvironment(bounds, extensions=(loopcontrols, _Generation))
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    del environment.globals["lipsum"]  # random text of any length
    return environment
