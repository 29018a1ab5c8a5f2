"""How models write calls and reasoning, as their own templates show it."""

from __future__ import annotations

import dataclasses

import pytest

from heavy.templates.test_rendered import CONTROL
from lacre_backend.api.template.prompt import ChatTemplate
from lacre_backend.api.tools.format import (
    FUNCTIONARY,
    HERMES,
    LLAMA,
    MISTRAL,
    CallFormat,
)
from lacre_backend.api.tools.gemma import GEMMA
from lacre_backend.api.tools.harmony import HARMONY_CALLS
from lacre_backend.api.tools.tagged import GLM, QWEN_CODER, SEED
from lacre_backend.engine.protocol import ControlToken
from parts.echo_engine import EchoEngine

CALLS: dict[str, CallFormat] = {
    "Qwen-Qwen2.5-7B-Instruct": HERMES,
    "Qwen-Qwen3-0.6B": HERMES,
    "Qwen-QwQ-32B": HERMES,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": HERMES,
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA,
    "Mistral-Small-3.2-24B-Instruct-2506": MISTRAL,
    "unsloth-mistral-Devstral-Small-2507": MISTRAL,
    "mistralai-Ministral-3-14B-Reasoning-2512": MISTRAL,
    "meetkai-functionary-medium-v3.1": FUNCTIONARY,
    "Qwen3-Coder": QWEN_CODER,
    "Qwen3.5-4B": QWEN_CODER,
    "ByteDance-Seed-OSS": SEED,
    "GLM-4.6": GLM,
    "google-gemma-4-31B-it": GEMMA,
    "openai-gpt-oss-120b": HARMONY_CALLS,
}
THOUGHTS = {
    "Qwen-Qwen3-0.6B": "</think>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "</think>",
    "ByteDance-Seed-OSS": "</seed:think>",
    "MiniMax-M3": "</mm:think>",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[/THINK]",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_THINKING|>",
    "Apertus-8B-Instruct": "<|inner_suffix|>",
    "google-gemma-4-31B-it": "<channel|>",
    "openai-gpt-oss-120b": "<|end|>",
    "Apriel-1.6-15b-Thinker-fixed": "[BEGIN FINAL RESPONSE]",
    "meta-llama-Llama-3.1-8B-Instruct": None,
    "microsoft-Phi-3.5-mini-instruct": None,
}


def loaded(source: str) -> ChatTemplate:
    """With the control tokens that the template writes."""
    control = tuple(ControlToken(1000 + i, text) for i, text in enumerate(sorted({*CONTROL.findall(source)})))
    return ChatTemplate(dataclasses.replace(EchoEngine().model, chat_template=source, control_tokens=control))


@pytest.mark.parametrize("name", CALLS)
def test_the_format_of_calls(name: str, templates: dict[str, str]) -> None:
    assert loaded(templates[name]).calls == CALLS[name]


@pytest.mark.parametrize("name", THOUGHTS)
def test_the_format_of_reasoning(name: str, templates: dict[str, str]) -> None:
    thoughts = loaded(templates[name]).thoughts
    assert (None if thoughts is None else thoughts.close) == THOUGHTS[name]
