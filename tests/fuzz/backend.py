"""Targets of what a worker takes apart for its model: callers' JSON schemas, and the chat template of a model's file."""

from __future__ import annotations

import json
from typing import Any, Final

import jinja2
import numpy as np
import pydantic_core
from llguidance import LLMatcher

from fuzz.target import Target
from lacre.errors import UsageError
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.schema.patterns import byte_tokenizer
from lacre_backend.api.template.bounds import Bounds
from lacre_backend.api.template.environment import template_environment

SMALL: Final = Bounds(rounds=2000, size=2**17, seconds=5.0)
MESSAGES: Final = [{"role": "user", "content": "Hello <b>"}, {"role": "assistant", "content": "Hi"}]
_TEMPLATE_ERRORS: Final = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class Refused(UsageError):
    """A template that was not rendered."""


def json_schema(data: bytes) -> str:
    """The first byte: whether what cannot be enforced is refused."""
    try:
        schema = pydantic_core.from_json(data[1:], allow_inf_nan=False)
    except ValueError:
        raise RequestRefused("no JSON") from None
    if not isinstance(schema, dict):
        raise RequestRefused("no object")
    grammars = Grammars()
    return grammars.text(f"start: {grammars.schema(schema, 'response_format', strict=not data or data[0] % 2 == 0)}\n")


def compiles(_data: bytes, source: str) -> None:
    """What comes out is a grammar that llguidance reads, or refuses for its size: it never panics, and masks are bounded."""
    matcher = LLMatcher(byte_tokenizer(), source, log_level=0)
    for _ in range(4):
        if matcher.is_error():
            assert "panic" not in matcher.get_error()
            return
        allowed = np.flatnonzero(np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8))
        if len(allowed) == 0 or (allowed[-1] >= 256 and len(allowed) == 1):
            return
        matcher.consume_token(int(allowed[0]))


def chat_template(data: bytes) -> str:
    environment = template_environment(SMALL)
    try:
        template = environment.compiled(data.decode("utf-8", "replace"))
        return environment.rendered(template, {"messages": MESSAGES, "tools": None, "add_generation_prompt": True})
    except _TEMPLATE_ERRORS:
        raise Refused("not rendered") from None


def bounded(data: bytes, text: str) -> None:
    assert len(text) <= SMALL.size + len(data) * SMALL.rounds
    for inside in ("<module ", "__subclasses__", "__globals__", "/usr/"):
        assert inside not in text or inside.encode() in data, "a template sees this process"


def example(**schema: Any) -> bytes:
    return b"\x00" + json.dumps(schema).encode()


TARGETS: Final = (
    Target("json_schema", json_schema, (RequestRefused,), compiles, max_length=1024, json=True, floor=2**24),
    Target("chat_template", chat_template, (Refused,), bounded, max_length=512, floor=2**25),
)
