"""How models write calls and reasoning, as their own templates show it: the table of docs/call-formats.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import pytest

from heavy.conftest import ROOT
from heavy.templates.test_rendered import CONTROL
from lacre.errors import SettingsError
from lacre_backend.api.template.prompt import ChatTemplate
from lacre_backend.api.tools import format as plain
from lacre_backend.api.tools import tagged
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.gemma import GEMMA
from lacre_backend.api.tools.harmony import HARMONY_CALLS
from lacre_backend.api.tools.known import KNOWN_CALLS
from lacre_backend.api.tools.pythonic import LFM, PYTHONIC
from lacre_backend.api.tools.recipients import FUNCTIONARY_3_2
from lacre_backend.engine.protocol import ControlToken
from parts.echo_engine import EchoEngine

DOCUMENT: Final = ROOT / "docs/call-formats.md"
HEAD: Final = "| template | reasoning ends with | calls |\n|---|---|---|\n"
NAMES: Final[dict[str, CallFormat]] = {
    "Hermes": plain.HERMES,
    "Llama 3": plain.LLAMA,
    "Mistral": plain.MISTRAL,
    "Mistral's list": plain.MISTRAL_LIST,
    "Mistral's list, spaced": plain.MISTRAL_SPACED,
    "DeepSeek V3 and R1": plain.DEEPSEEK,
    "DeepSeek V3.1": plain.DEEPSEEK_V3_1,
    "DeepSeek V3.2": tagged.DEEPSEEK_V3_2,
    "DeepSeek V4": tagged.DEEPSEEK_V4,
    "Kimi K2": plain.KIMI,
    "Functionary 3.1": plain.FUNCTIONARY,
    "Functionary 3.2": FUNCTIONARY_3_2,
    "Apertus": plain.APERTUS,
    "Apriel": plain.APRIEL,
    "MiniMax M1": plain.MINIMAX_M1,
    "MiniMax M2": tagged.MINIMAX,
    "Nemotron Nano 2": plain.NEMOTRON,
    "GigaChat 3.1": plain.GIGACHAT,
    "Command R7B": plain.COMMAND,
    "Qwen3-Coder": tagged.QWEN_CODER,
    "Seed-OSS": tagged.SEED,
    "GLM 4.5 and 4.6": tagged.GLM,
    "GLM 4.7": tagged.GLM_CLOSE,
    "Hunyuan 3": tagged.HY,
    "Gemma 4": GEMMA,
    "Harmony": HARMONY_CALLS,
    "LFM2.5": LFM,
    "Python": PYTHONIC,
}
# Why tools and calls are text, in the form of Hermes.
NO_TOOLS: Final = "as text: the template takes no tools"
NO_CALLS: Final = "as text: the template shows no calls"
FAILS: Final = "as text: the template fails on calls, in transformers too"
OWN: Final = "as text: a format of its own"
AS_TEXT: Final = {
    "CohereForAI-c4ai-command-r-plus-tool_use": FAILS,
    "GigaChat3-10B-A1.8B": OWN,
    "HuggingFaceTB-SmolLM3-3B": "as text: the template takes tools under another name",
    "Kimi-K2-Instruct": FAILS,
    "Kimi-K2-Thinking": FAILS,
    "Kimi-K3": OWN,
    "LFM2-8B-A1B": NO_CALLS,
    "LFM2.5-Instruct": NO_CALLS,
    "MiniMax-M3": OWN,
    "google-gemma-2-2b-it": NO_TOOLS,
    "ibm-granite-granite-3.3-2B-Instruct": NO_CALLS,
    "llama-cpp-rwkv-world": NO_TOOLS,
    "microsoft-Phi-3.5-mini-instruct": NO_TOOLS,
    "muse-glimmer": OWN,
    "openbmb-MiniCPM5-1B": OWN,
    "upstage-Solar-Open-100B": OWN,
}


def loaded(source: str) -> ChatTemplate:
    """With the control tokens that the template writes."""
    control = tuple(ControlToken(1000 + i, text) for i, text in enumerate(sorted({*CONTROL.findall(source)})))
    return ChatTemplate(dataclasses.replace(EchoEngine().model, chat_template=source, control_tokens=control))


def rows(templates: dict[str, str]) -> Iterator[str]:
    for name, source in templates.items():
        try:
            template = loaded(source)
        except SettingsError:
            yield f"| {name} | | the worker does not start: it takes no message |"
            continue
        calls = next((said for said, form in NAMES.items() if form is template.calls), AS_TEXT.get(name, "?"))
        told = calls if template.calls is None or template.manner.listed else f"{calls}; tools in the system message"
        thoughts = "" if template.thoughts is None else f"`{template.thoughts.close}`".replace("|", "\\|")
        yield f"| {name} | {thoughts} | {told} |"


def test_the_table_of_each_template_is_what_its_loading_finds(templates: dict[str, str]) -> None:
    found = "\n".join(rows(templates)) + "\n"
    table = DOCUMENT.read_text(encoding="utf-8").partition(HEAD)[2]
    assert table.partition("\n\n")[0].strip() == found.strip()
    assert "?" not in found and len(templates) >= 70
    assert all(name in templates for name in AS_TEXT)


def test_each_known_format_has_a_name() -> None:
    assert sorted(map(repr, NAMES.values())) == sorted(map(repr, KNOWN_CALLS))


@pytest.mark.parametrize("name", ["Qwen3-Coder", "GLM-4.6", "openai-gpt-oss-120b", "meetkai-functionary-medium-v3.2"])
def test_a_template_that_only_mentions_its_marks_has_no_format(name: str, templates: dict[str, str]) -> None:
    """The fallback's instructions, and no reasoning apart: the model's answers are text."""
    words = templates[name].replace("{", "(").replace("}", ")").replace("</think>", "")
    mentions = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}\n{{% endfor %}}{words}"
    template = loaded(mentions)
    assert (template.calls, template.thoughts) == (None, None)
