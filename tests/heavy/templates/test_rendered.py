"""What we render from chat templates is what transformers' `apply_chat_template` renders, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any, Final

from heavy.conftest import Environment
from lacre_backend.api.template import ChatTemplate, Message
from lacre_backend.engine.echo import EchoEngine

BY_TRANSFORMERS: Final = Path(__file__).with_name("by_transformers.py")
_CHAT: Final[list[Message]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": 'Olá "<b>" 🌊'},
    {"role": "assistant", "content": "It rises."},
    {"role": "user", "content": "When?"},
]
_PLAIN: Final = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m['content'] }}<|end|>\n{% endfor %}<|start|>assistant\n"


def by_transformers(environment: Environment, cases: list[dict[str, Any]]) -> list[dict[str, str]]:
    command = [environment("templates"), "-P", str(BY_TRANSFORMERS)]
    done = subprocess.run(command, input=json.dumps(cases), check=True, stdout=subprocess.PIPE, text=True)
    told: list[dict[str, str]] = json.loads(done.stdout)
    return told


def by_ours(case: dict[str, Any]) -> str:
    model = dataclasses.replace(EchoEngine().model, chat_template=case["template"])
    pieces = ChatTemplate(model).render(case["messages"], case["tools"])
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


def test_a_plain_template(environment: Environment) -> None:
    case: dict[str, Any] = {"template": _PLAIN, "bos_token": "<s>", "eos_token": "</s>", "messages": _CHAT, "tools": None}
    case["add_generation_prompt"] = True
    assert by_transformers(environment, [case]) == [{"text": by_ours(case)}]
