"""Targets of what a worker takes apart for its model: callers' chats and JSON schemas, and the chat template of its file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

import jinja2
import numpy as np
import pydantic_core
from llguidance import LLMatcher

from fuzz.target import Target
from lacre.errors import UsageError
from lacre.wire.outer import MAX_PARTS
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.messages import check_media
from lacre_backend.api.requests import ExplainRequest, parse_chat, parse_explain
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.schema.patterns import byte_tokenizer
from lacre_backend.api.template.bounds import Bounds
from lacre_backend.api.template.environment import template_environment
from lacre_backend.api.template.pieces import Piece
from lacre_backend.api.template.prompt import ChatTemplate, TemplateRefused
from lacre_backend.engine.protocol import ControlToken
from parts.echo_engine import EchoEngine

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


_MODEL: Final = EchoEngine(name="tiny").model
# One that looks into everything that a request may hold.
_SOURCE: Final = (
    "{% macro told(s) %}{% for name, each in (s.properties or {}).items() %}{{ name }}{{ told(each) }}{% endfor %}"
    "{% endmacro %}"
    "{% for t in tools or [] %}{{ t.function.name }}{{ told(t.function.parameters) }}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n{% endfor %}"
)
TEMPLATE: Final = ChatTemplate(dataclasses.replace(_MODEL, chat_template=_SOURCE))


def chat_request(data: bytes) -> tuple[int, tuple[Piece, ...]] | None:
    """How many messages the request has, and its prompt; None where the template does not take it."""
    parsed = parse_chat(data)
    check_media(parsed.messages, parsed.model)
    calling = parsed.calling()
    told = [] if calling is None else [tool.for_template() for tool in calling.tools]
    try:
        return len(parsed.messages), TEMPLATE.render([message.for_template() for message in parsed.messages], told or None)
    except TemplateRefused:
        return None


def only_its_own_control_tokens(_data: bytes, rendered: tuple[int, tuple[Piece, ...]] | None) -> None:
    """Whatever a request holds: two for each message. All else can be written down."""
    if rendered is None:
        return
    messages, pieces = rendered
    assert sum(isinstance(piece, ControlToken) for piece in pieces) == 2 * messages
    "".join(piece for piece in pieces if isinstance(piece, str)).encode()


def each_part_alone_is_left_out(_data: bytes, request: ExplainRequest) -> None:
    """Whatever their ids and texts: all the rest of the conversation stays, in its order."""
    written = [message.for_template() for message in request.messages]
    assert len(request.parts) <= MAX_PARTS
    for name, (i, j) in request.parts.items():
        left = request.without(name)
        assert [message.for_template() for k, message in enumerate(left) if k != i] == written[:i] + written[i + 1 :]
        content, kept = request.messages[i].content or [], left[i].content or []
        assert len(kept) == max(len(content) - 1, 1)
        assert [part for part in kept if len(content) > 1] == [*content[:j], *content[j + 1 :]]
    assert [message.for_template() for message in request.messages] == written


TARGETS: Final = (
    Target("explain_request", parse_explain, (RequestRefused,), each_part_alone_is_left_out, json=True),
    Target("chat_request", chat_request, (RequestRefused,), only_its_own_control_tokens, json=True),
    Target("json_schema", json_schema, (RequestRefused,), compiles, max_length=1024, json=True, floor=2**24),
    Target("chat_template", chat_template, (Refused,), bounded, max_length=512, floor=2**25),
)
