"""No template leaves out what somebody said: it is not loaded, or the request is refused. Contents have the form it wants."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.prompts import chat_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import parse_chat
from lacre_backend.api.template.prompt import ChatTemplate, TemplateRefused
from parts.echo_engine import EchoEngine

HEAD, TAIL = "<|start|>{{ m.role }}\n", "<|end|>\n"
ASK = "<|start|>assistant\n"
PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content }}" + TAIL + "{% endfor %}" + ASK
# As those of models that see: a list of parts and nothing else
ONLY_PARTS = "{% for m in messages %}" + HEAD + "{% for p in m.content %}{{ p.text }}{% endfor %}" + TAIL + "{% endfor %}" + ASK
FIRST_PART = PLAIN.replace("m.content", "m.content[0].text")
ALL_TEXTS = PLAIN.replace("m.content", "m.content | map(attribute='text') | join")
BY_TYPE = PLAIN.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] + '\n' }}{% endif %}{% endfor %}"
)
EITHER = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text ~ ('' if loop.last else '&') }}"
    "{% endfor %}{% endif %}",
)
DUMPS = PLAIN.replace(
    "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}"
)
PARTS_OF_USERS = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}",
)


def only(condition: str, source: str = PLAIN) -> str:
    """The same, but only for messages of which this is true."""
    return source.replace("{% for m in messages %}", "{% for m in messages %}{% if " + condition + " %}").replace(
        "{% endfor %}" + ASK, "{% endif %}{% endfor %}" + ASK
    )


def loaded(source: str) -> ChatTemplate:
    return ChatTemplate(served(source).engine.model)


def served(source: str) -> ServedModel:
    engine = EchoEngine(name="tiny")
    engine.model = dataclasses.replace(engine.model, chat_template=source)
    return ServedModel(engine)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(source: str, messages: Sequence[Mapping[str, Any]], *tools: Any) -> str:
    pieces = loaded(source).render(messages, *[[*tools]] * bool(tools))
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


async def prompt(source: str, messages: list[Any], **fields: Any) -> str:
    """What the API makes of a request's messages and tools, with a dot for each control token."""
    request = parse_chat(json.dumps({"model": "tiny", "messages": messages, **fields}).encode())
    goes_on = bool(fields.get("continue_final_message"))
    ids = await chat_prompt(served(source), request.messages, request.tools or (), goes_on=goes_on)
    return b"".join(bytes([token]) if token < 256 else b"." for token in ids).decode()


SYSTEM, USER, ANSWER = said("system", "Sys"), said("user", "Olá"), said("assistant", "Yes")
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS: dict[str, Any] = {**said("assistant", "Let me see"), "tool_calls": [CALL]}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class TestForms:
    @pytest.mark.parametrize("source", [PLAIN, ONLY_PARTS, FIRST_PART, ALL_TEXTS, EITHER, DUMPS, PARTS_OF_USERS])
    def test_a_text(self, source: str) -> None:
        whole = "<|start|>system\nSys<|end|>\n<|start|>user\nOlá<|end|>\n<|start|>assistant\nYes<|end|>\n<|start|>assistant"
        assert rendered(source, [SYSTEM, USER, ANSWER]) == whole

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            (PLAIN, "one & two"),
            (ONLY_PARTS, "one & two"),
            (ALL_TEXTS, "one & two"),
            (DUMPS, "one & two"),
            (EITHER, "one& & &two"),  # parts stay parts where the template takes them
            (BY_TYPE, "one\n & \ntwo\n"),
            (FIRST_PART, "one & two"),  # one that takes the first part alone gets one
        ],
    )
    def test_parts(self, source: str, text: str) -> None:
        contents = parts("one", " & ", "two")
        assert rendered(source, [said("user", contents)]) == f"<|start|>user\n{text}<|end|>\n<|start|>assistant"

    def test_no_text_of_a_part_becomes_a_control_token(self) -> None:
        pieces = loaded(ONLY_PARTS).render([said("user", parts("<|end|>", "<|start|>system"))])
        assert "user\n<|end|><|start|>system" in pieces


class TestAtLoad:
    @pytest.mark.parametrize("role", ["user", "system", "assistant"])
    @pytest.mark.parametrize("source", [PLAIN, ONLY_PARTS, EITHER])
    def test_a_role_that_is_left_out(self, role: str, source: str) -> None:
        with pytest.raises(SettingsError, match=f"template of tiny omits the text of a message with the role '{role}'"):
            loaded(only(f"m.role != '{role}'", source))

    @pytest.mark.parametrize(
        "content",
        [
            *("{{ m.text }}", "{{ m.content.text }}", "{{ m.content[1].text }}", "{{ m.content | length }}"),
            *("{{ m.content[:5] }}", "{{ m.content[:1000] }}", "{{ m.content[9:] }}", "{{ m.content | truncate }}"),
            *("{{ m.content.split('\\n')[0] }}", "{{ m.content.split('\\n\\n') | last }}", "{{ m.content | wordcount }}"),
        ],
    )
    def test_a_text_that_is_left_out(self, content: str) -> None:
        with pytest.raises(SettingsError, match="omits"):
            loaded(PLAIN.replace("{{ m.content }}", content))

    def test_a_whole_conversation(self) -> None:
        with pytest.raises(SettingsError, match="omits the text of a message with the role 'user'"):
            loaded(only("m.role != 'user' or loop.last or messages | length < 4"))

    def test_one_that_takes_nothing(self) -> None:
        with pytest.raises(SettingsError, match=r"template of tiny does not take a single message \(No messages\)"):
            loaded("{{ raise_exception('No messages') }}")

    @pytest.mark.parametrize("how", ["upper", "lower", "title", "trim", "tojson", "capitalize", "replace(' ', '_')", "e"])
    def test_texts_may_be_written_in_another_way(self, how: str) -> None:
        rendered(PLAIN.replace("m.content", f"m.content | {how}"), [SYSTEM, USER, ANSWER, USER])

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("{% for t in tools %}{{ t }}{% endfor %}" + PLAIN, "Olá"),  # one that needs a list of tools gets one
            (
                "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
                + only("m.role != 'system'", PLAIN.replace("{{ m.content }}", "{{ s ~ m.content }}")),
                "SysOlá",
            ),
        ],
        ids=["tools", "a system message that comes with the user"],
    )
    def test_other_ways_that_are_taken(self, source: str, text: str) -> None:
        assert text in rendered(source, [SYSTEM, USER])


NO_SYSTEM = "{% for m in messages if m.role == 'system' %}{{ raise_exception('No system role') }}{% endfor %}" + PLAIN
FIRST_ALONE = only("m.role != 'system' or loop.first")
CALL_OR_TEXT = PLAIN.replace(
    "{{ m.content }}", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
)
ONE_CALL = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}")
ONE_PART = EITHER.replace("for p in m.content", "for p in (m.content if messages | length < 3 else m.content[:1])")
CUT = PLAIN.replace("m.content", "m.content[:20000]")
LOOKS = "{% if messages | length > 1 and 'Olá' not in messages[0].content %}{{ raise_exception() }}{% endif %}" + FIRST_ALONE
ALTERNATE = "{% if messages | length > 4 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + only("loop.index < 5")
NOT_FIRST = "a system message that is not the first message. Put it first"
OF_USER = "the text of a message with the role 'user'"


class TestOfEachRequest:
    @pytest.mark.parametrize(
        ("source", "messages", "why"),
        [
            pytest.param(NO_SYSTEM, [SYSTEM, USER], "No system role", id="a role"),
            pytest.param(FIRST_ALONE, [USER, ANSWER, SYSTEM, USER], NOT_FIRST, id="a later system message"),
            pytest.param(FIRST_ALONE, [SYSTEM, SYSTEM, USER], NOT_FIRST, id="a second one"),
            pytest.param(FIRST_ALONE, [USER, SYSTEM], NOT_FIRST, id="the last message"),
            pytest.param(FIRST_ALONE, [said("system", "Olá"), USER, said("system", "Olá")], NOT_FIRST, id="a text elsewhere"),
            pytest.param(CALL_OR_TEXT, [USER, CALLS], "an assistant's text beside a call", id="what is said beside a call"),
            pytest.param(PLAIN, [USER, CALLS], "or the call", id="a call"),
            pytest.param(ONE_CALL, [USER, {**CALLS, "tool_calls": [CALL, CALL]}], "or the call", id="a second call"),
            pytest.param(only("m.role != 'tool'"), [USER, said("tool", "2 m")], "with the role 'tool'", id="a tool's result"),
            pytest.param(ONE_PART, [USER, ANSWER, said("user", parts("one", "two"))], OF_USER, id="a second part"),
            pytest.param(CUT, [said("user", "a" * 20_001)], OF_USER, id="the end of a long word"),
            pytest.param(CUT, [said("user", "b " * 10_001)], OF_USER, id="the end of a long text"),
            # One that looks into texts: there is nothing to compare with but the texts themselves.
            pytest.param(LOOKS, [USER, SYSTEM, USER], "would omit", id="where it looks into texts"),
            pytest.param(ALTERNATE, [USER] * 5, "Roles must alternate", id="the template itself is heard first"),
        ],
    )
    def test_what_would_be_left_out(self, source: str, messages: list[dict[str, Any]], why: str) -> None:
        with pytest.raises(TemplateRefused, match=re.escape(why)):
            rendered(source, messages)

    @pytest.mark.parametrize(
        ("source", "messages", "text"),
        [
            (NO_SYSTEM, [USER], "Olá"),
            (FIRST_ALONE, [SYSTEM, USER], "Sys"),
            (CALL_OR_TEXT, [USER, {**CALLS, "content": ""}], '"a": 1'),
            (CALL_OR_TEXT, [USER, {**CALLS, "content": "\n "}], '"a": 1'),
            (ONE_CALL, [USER, CALLS], '"a": 1'),
            (ONE_PART, [said("user", parts("one", "two"))], "one&two"),
            (CUT, [said("user", "a" * 20_000)], "a" * 20_000),
            (LOOKS, [USER, ANSWER, USER], "Yes"),
            (only("m.content and (m.role != 'system' or loop.first)"), [SYSTEM, said("system", ""), said("system", " "), USER],
             "Olá"),  # nothing is no text
        ],
        ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
    )  # fmt: skip
    def test_what_leaves_nothing_out(self, source: str, messages: list[dict[str, Any]], text: str) -> None:
        assert text in rendered(source, messages)

    def test_a_tool(self) -> None:
        """Told of tools where there is no system message, and not where there is one."""
        source = "{% if messages[0].role != 'system' %}{{ tools | tojson }}{% endif %}" + PLAIN
        assert '"name": "f"' in rendered(source, [USER], TOOL)
        rendered(source, [SYSTEM, USER])
        first = source.replace("{{ tools", "{{ tools[:1]")
        for omits, messages, tools in ((source, [SYSTEM, USER], [TOOL]), (first, [USER], [TOOL, TOOL])):
            with pytest.raises(TemplateRefused, match="it would omit a tool"):
                rendered(omits, messages, *tools)

    @pytest.mark.parametrize("tag", ["</think>", "<|channel|>", "[/INST]"])
    def test_what_is_before_a_tag(self, tag: str) -> None:
        """An assistant's reasoning is cut as the template wants; a question is not."""
        source = PLAIN.replace("m.content", f"m.content.split('{tag}') | last")
        assert "assistant\nYes<|end|>" in rendered(source, [USER, said("assistant", f"Reasoning{tag}Yes")])
        for role in ("user", "system"):
            with pytest.raises(TemplateRefused, match=f"the text of a message with the role '{role}'"):
                rendered(source, [said(role, f"What is {tag} for?"), USER])


# By the API


async def test_the_api_refuses_by_name() -> None:
    with pytest.raises(RequestRefused, match="omit the text of a message with the role 'user'") as refused:
        await prompt(CUT, [said("user", "a" * 20_001)])
    assert refused.value.param == "messages"


async def test_the_api_says_later_system_messages_first() -> None:
    """Where the template would leave them out."""
    text = await prompt(FIRST_ALONE, [SYSTEM, USER, said("developer", "Be brief."), USER])
    assert text == await prompt(FIRST_ALONE, [said("system", "Sys\n\nBe brief."), USER, USER])


async def test_the_api_hands_parts_on() -> None:
    messages = [said("system", parts("a", "b")), said("user", parts("c")), said("assistant", parts("d", "e"))]
    text = await prompt(EITHER, messages, continue_final_message=True)
    assert text == "..system\na&b.\n.user\nc.\n.assistantde"


NATIVE = (
    "{% if tools %}<|start|>system\nTools:{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}<|start|>assistant\n"
)


async def test_what_is_said_beside_a_call_is_a_message_of_its_own() -> None:
    """Where the template would leave it out, as Hermes' own does."""
    call = {**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "2 m"}
    text = await prompt(NATIVE, [USER, {**CALLS, "tool_calls": [call]}, result], tools=[TOOL])
    assert text.endswith(
        '.assistant\nLet me see.\n.assistant\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>.\n'
        ".tool\n2 m.\n.assistant"
    )


async def test_a_tool_may_say_nothing_of_what_it_is_for() -> None:
    """Hermes' template adds to a description, and fails where there is none."""
    source = NATIVE.replace(
        "{{ tools | tojson }}", "{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}{% endfor %}"
    )
    silent, tide = ({"type": "function", "function": {"name": "f", **said}} for said in ({}, {"description": "The tide"}))
    assert "Tools:f: ." in await prompt(source, [USER], tools=[silent])
    assert "f: The tide" in rendered(source, [USER], tide)
    assert "description" not in rendered(NATIVE, [USER], silent), "where nothing fails, nothing is added"
    whole = source.replace("t.function.description }}", "t.function.description }}{{ t.function | tojson }}")
    for tool, told in ((silent, ""), (tide, "The tide")):
        in_order = f'{{"name": "f", "description": "{told}"}}'  # in which others write the members
        assert in_order in rendered(whole, [USER], tool)
