"""A target of what stands inside the seal: chats on their way to a prompt."""

from __future__ import annotations

import dataclasses
from typing import Final

from fuzz.target import Target
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import parse_chat
from lacre_backend.api.template.prompt import ChatTemplate, Piece, TemplateRefused
from lacre_backend.engine.protocol import ControlToken
from parts.echo_engine import EchoEngine

_MODEL: Final = EchoEngine(name="tiny").model
# One that looks into everything that a request may hold.
_SOURCE: Final = (
    "{% macro told(s) %}{% for name, each in (s.properties or {}).items() %}{{ name }}{{ told(each) }}{% endfor %}"
    "{% endmacro %}"
    "{% for t in tools or [] %}{{ t.function.name }}{{ told(t.function.parameters) }}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n{% endfor %}"
)
_TEMPLATE: Final = ChatTemplate(dataclasses.replace(_MODEL, chat_template=_SOURCE))


def request(data: bytes) -> tuple[int, tuple[Piece, ...]] | None:
    """How many messages the request has, and its prompt; None where the template does not take it."""
    parsed = parse_chat(data)
    calling = parsed.calling()
    told = [] if calling is None else [tool.for_template() for tool in calling.tools]
    try:
        return len(parsed.messages), _TEMPLATE.render([message.for_template() for message in parsed.messages], told or None)
    except TemplateRefused:
        return None


def only_its_own_control_tokens(_data: bytes, rendered: tuple[int, tuple[Piece, ...]] | None) -> None:
    """Whatever a request holds: two for each message. All else can be written down."""
    if rendered is None:
        return
    messages, pieces = rendered
    assert sum(isinstance(piece, ControlToken) for piece in pieces) == 2 * messages
    "".join(piece for piece in pieces if isinstance(piece, str)).encode()


TARGETS: Final = (Target("chat_request", request, (RequestRefused,), only_its_own_control_tokens, json=True),)
