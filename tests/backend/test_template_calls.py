"""How a template takes tools and calls is learned from what it renders, and the API gives it both in that manner."""

from __future__ import annotations

from typing import Any

import pytest

from backend.test_template_texts import ASK, SYSTEM, USER, loaded, prompt, said
from lacre_backend.api.template.calls import USUAL, Manner
from lacre_backend.api.tools.format import DEEPSEEK_V3_1, HERMES, MISTRAL

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object"}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_tide", "arguments": '{"port": "Porto"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "It rises."}
USED = [USER, CALLED, RESULT]
EACH = "{% for m in messages %}<|start|>{{ m.role }}\n"
HERMES_CALLS = (
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
NATIVE = "{% if tools %}{{ tools | tojson }}{% endif %}" + EACH + "{{ m.content }}" + HERMES_CALLS + "{% endfor %}" + ASK
# It lists no tools, wants arguments as text, and waits for a content that is null.
SILENT = (
    EACH + "{% if m.content is none %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>"
    "{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + ASK
)
# It writes the system message with the last user's, if nothing follows.
LATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}\n{% if loop.last %}{{ sys }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}" + ASK
).replace("{% if loop.last %}", "{% if loop.last and m.role != 'tool' %}")


def test_a_format_is_a_call_that_is_shown_with_its_result() -> None:
    assert (loaded(NATIVE).calls, loaded(NATIVE).manner) == (HERMES, USUAL)
    assert loaded(NATIVE.replace("{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}")).calls is None
    mentions = EACH + '{{ m.content }}{% endfor %}Write <tool_call>\\n{"name": "get_tide", "arguments": {}}' + ASK
    assert loaded(mentions).calls is None


async def test_a_template_that_lists_no_tools_gets_them_in_the_system_message() -> None:
    assert (loaded(SILENT).calls, loaded(SILENT).manner) == (DEEPSEEK_V3_1, Manner(as_text=True, silent=True, listed=False))
    text = await prompt(SILENT, [SYSTEM, *USED], tools=[TOOL])
    taught, _, history = text.partition("Olá")
    assert "Sys\n\nYou can call functions." in taught and '"name": "get_tide"' in taught
    assert DEEPSEEK_V3_1.begin + DEEPSEEK_V3_1.written("NAME", "{ARGUMENTS}") + DEEPSEEK_V3_1.end in taught
    assert DEEPSEEK_V3_1.begin + DEEPSEEK_V3_1.written("get_tide", '{"port": "Porto"}') in history and "It rises." in history
    assert "You can call" not in await prompt(SILENT, [SYSTEM, *USED])


async def test_a_text_beside_a_call_becomes_a_message_before_it() -> None:
    text = await prompt(SILENT, [USER, {**CALLED, "content": "Let me see."}, RESULT], tools=[TOOL])
    assert text.index("Let me see.") < text.index(DEEPSEEK_V3_1.written("get_tide", '{"port": "Porto"}'))


async def test_a_system_message_that_a_result_would_hide_goes_to_the_last_user() -> None:
    assert loaded(LATE).calls is MISTRAL
    used = await prompt(LATE, [SYSTEM, said("user", "One"), said("assistant", "Two"), *USED], tools=[TOOL])
    assert "Two" in used and used.index("Two") < used.index("Sys\n\nOlá") < used.index("[TOOL_CALLS]get_tide[ARGS]")


@pytest.mark.parametrize("source", [SILENT, LATE, NATIVE])
async def test_each_manner_brings_the_call_into_the_prompt(source: str) -> None:
    assert "Porto" in await prompt(source, USED, tools=[TOOL])
