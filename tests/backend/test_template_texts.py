"""No template leaves out what somebody said: it is not loaded, or the request is refused. Contents have the form it wants."""

from __future__ import annotations

import dataclasses
import json
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
    return ChatTemplate(dataclasses.replace(EchoEngine(name="tiny").model, chat_template=source))


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(source: str, messages: Sequence[Mapping[str, Any]]) -> str:
    return "".join(piece if isinstance(piece, str) else piece.text for piece in loaded(source).render(messages))


SYSTEM, USER, ANSWER = said("system", "Sys"), said("user", "Olá"), said("assistant", "Yes")
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS: dict[str, Any] = {**said("assistant", "Let me see"), "tool_calls": [CALL]}


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
            (EITHER, "one& &two"),
        ],
    )
    def test_parts_stay_parts_where_the_template_takes_them(self, source: str, text: str) -> None:
        contents = parts("one", " ", "two") if source is EITHER else parts("one", " & ", "two")
        assert rendered(source, [said("user", contents)]) == f"<|start|>user\n{text}<|end|>\n<|start|>assistant"

    def test_each_part_has_its_line_where_the_template_writes_it_so(self) -> None:
        assert rendered(BY_TYPE, [said("user", parts("one", "two"))]) == "<|start|>user\none\ntwo\n<|end|>\n<|start|>assistant"

    def test_one_that_takes_the_first_part_alone_gets_one(self) -> None:
        assert "onetwo" in rendered(FIRST_PART, [said("user", parts("one", "two"))])

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

    def test_a_role_that_is_refused_is_for_the_request(self) -> None:
        source = (
            "{% for m in messages if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endfor %}"
            + PLAIN
        )
        assert "Olá" in rendered(source, [USER])
        with pytest.raises(TemplateRefused, match="System role not supported"):
            rendered(source, [SYSTEM, USER])

    @pytest.mark.parametrize("how", ["upper", "lower", "title", "trim", "tojson", "capitalize", "replace(' ', '_')", "e"])
    def test_texts_may_be_written_in_another_way(self, how: str) -> None:
        rendered(PLAIN.replace("m.content", f"m.content | {how}"), [SYSTEM, USER, ANSWER, USER])

    def test_one_that_needs_a_list_of_tools_gets_one(self) -> None:
        assert "Olá" in rendered("{% for t in tools %}{{ t }}{% endfor %}" + PLAIN, [USER])

    def test_a_system_message_that_comes_with_the_user(self) -> None:
        source = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}" + only(
            "m.role != 'system'", PLAIN.replace("{{ m.content }}", "{{ s ~ m.content }}")
        )
        assert "SysOlá" in rendered(source, [SYSTEM, USER])


class TestOfEachRequest:
    @pytest.mark.parametrize("messages", [[USER, ANSWER, SYSTEM, USER], [SYSTEM, SYSTEM, USER], [USER, SYSTEM]])
    def test_a_later_system_message_that_is_left_out(self, messages: list[dict[str, Any]]) -> None:
        source = only("m.role != 'system' or loop.first")
        assert "Sys" in rendered(source, [SYSTEM, USER])
        with pytest.raises(TemplateRefused, match=r"a system message that is not the first message\. Put it first"):
            rendered(source, messages)

    def test_what_is_said_beside_a_call(self) -> None:
        call = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
        source = PLAIN.replace("{{ m.content }}", call)
        with pytest.raises(TemplateRefused, match="an assistant's text beside a call"):
            rendered(source, [USER, CALLS])
        assert '"a": 1' in rendered(source, [USER, {**CALLS, "content": ""}])
        assert '"a": 1' in rendered(source, [USER, {**CALLS, "content": "\n "}])

    def test_a_call(self) -> None:
        with pytest.raises(TemplateRefused, match="or the call"):
            rendered(PLAIN, [USER, CALLS])

    def test_all_but_the_first_of_several_calls(self) -> None:
        source = PLAIN.replace(
            "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
        )
        assert '"a": 1' in rendered(source, [USER, CALLS])
        with pytest.raises(TemplateRefused, match="or the call"):
            rendered(source, [USER, {**CALLS, "tool_calls": CALLS["tool_calls"] * 2}])

    def test_a_result_of_a_tool(self) -> None:
        with pytest.raises(TemplateRefused, match="the text of a message with the role 'tool'"):
            rendered(only("m.role != 'tool'"), [USER, said("tool", "2 m")])

    def test_a_tool(self) -> None:
        """Told of tools where there is no system message, and not where there is one."""
        source = "{% if messages[0].role != 'system' %}{{ tools | tojson }}{% endif %}" + PLAIN
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        template = loaded(source)
        assert '"name": "f"' in str(template.render([USER], [tool]))
        with pytest.raises(TemplateRefused, match="it would omit a tool"):
            template.render([SYSTEM, USER], [tool])
        template.render([SYSTEM, USER])
        with pytest.raises(TemplateRefused, match="it would omit a tool"):
            loaded(source.replace("{{ tools", "{{ tools[:1]")).render([USER], [tool, tool])

    def test_the_same_text_elsewhere_is_not_that_text(self) -> None:
        with pytest.raises(TemplateRefused):
            rendered(only("m.role != 'system' or loop.first"), [said("system", "Olá"), USER, said("system", "Olá")])

    def test_the_second_part_of_a_content(self) -> None:
        source = EITHER.replace("for p in m.content", "for p in (m.content if messages | length < 3 else m.content[:1])")
        assert "one&two" in rendered(source, [said("user", parts("one", "two"))])
        with pytest.raises(TemplateRefused, match="the text of a message with the role 'user'"):
            rendered(source, [USER, ANSWER, said("user", parts("one", "two"))])

    @pytest.mark.parametrize("text", ["a" * 20_001, "b " * 10_001])
    def test_the_end_of_a_long_text(self, text: str) -> None:
        source = PLAIN.replace("m.content", "m.content[:20000]")
        assert text[:20_000] in rendered(source, [said("user", text[:20_000])])
        with pytest.raises(TemplateRefused, match="the text of a message with the role 'user'"):
            rendered(source, [said("user", text)])

    @pytest.mark.parametrize("tag", ["</think>", "<|channel|>", "[/INST]"])
    def test_what_is_before_a_tag(self, tag: str) -> None:
        """An assistant's reasoning is cut as the template wants; a question is not."""
        source = PLAIN.replace("m.content", f"m.content.split('{tag}') | last")
        answer = said("assistant", f"Reasoning{tag}Yes")
        assert "assistant\nYes<|end|>" in rendered(source, [USER, answer])
        for role in ("user", "system"):
            with pytest.raises(TemplateRefused, match=f"the text of a message with the role '{role}'"):
                rendered(source, [said(role, f"What is {tag} for?"), USER])

    def test_nothing_is_no_text(self) -> None:
        source = only("m.content and (m.role != 'system' or loop.first)")
        assert "Olá" in rendered(source, [SYSTEM, said("system", ""), said("system", " "), USER])

    def test_a_template_that_looks_into_texts(self) -> None:
        """Then there is nothing to compare with but the texts themselves."""
        looks = "{% if messages | length > 1 and 'Olá' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
        source = looks + only("m.role != 'system'  or loop.first")
        assert "Yes" in rendered(source, [USER, ANSWER, USER])
        with pytest.raises(TemplateRefused, match="would omit"):
            rendered(source, [USER, SYSTEM, USER])

    def test_the_template_itself_is_heard_first(self) -> None:
        against = "{% if messages | length > 4 %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        with pytest.raises(TemplateRefused, match="Roles must alternate"):
            rendered(against + only("loop.index < 5"), [USER] * 5)


async def test_the_api_refuses_by_name() -> None:
    engine = EchoEngine(name="tiny")
    engine.model = dataclasses.replace(engine.model, chat_template=only("m.role != 'system' or loop.first"))
    body = {"model": "tiny", "messages": [USER, said("developer", "Be brief."), USER]}
    request = parse_chat(json.dumps(body).encode())
    with pytest.raises(RequestRefused, match="omit the text of a system message that is not the first") as refused:
        await chat_prompt(ServedModel(engine), request.messages, (), goes_on=False)
    assert refused.value.param == "messages"


async def test_the_api_hands_parts_on() -> None:
    engine = EchoEngine(name="tiny")
    engine.model = dataclasses.replace(engine.model, chat_template=EITHER)
    body = {
        "model": "tiny",
        "messages": [said("system", parts("a", "b")), said("user", parts("c")), said("assistant", parts("d", "e"))],
    }
    request = parse_chat(json.dumps({**body, "continue_final_message": True}).encode())
    ids = await chat_prompt(ServedModel(engine), request.messages, (), goes_on=True)
    text = b"".join(bytes([token]) if token < 256 else b"." for token in ids).decode()
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
    engine = EchoEngine(name="tiny")
    engine.model = dataclasses.replace(engine.model, chat_template=NATIVE)
    call = {**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "2 m"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": "tiny", "messages": [USER, {**CALLS, "tool_calls": [call]}, result], "tools": [tool]}
    request = parse_chat(json.dumps(body).encode())
    served = ServedModel(engine)
    assert served.template is not None and served.template.calls is not None
    ids = await chat_prompt(served, request.messages, request.tools, goes_on=False)
    text = b"".join(bytes([token]) if token < 256 else b"." for token in ids).decode()
    assert text.endswith(
        '.assistant\nLet me see.\n.assistant\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>.\n'
        ".tool\n2 m.\n.assistant"
    )


async def test_a_tool_may_say_nothing_of_what_it_is_for() -> None:
    """Hermes' template adds to a description, and fails where there is none."""
    engine = EchoEngine(name="tiny")
    source = NATIVE.replace(
        "{{ tools | tojson }}", "{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}{% endfor %}"
    )
    engine.model = dataclasses.replace(engine.model, chat_template=source)
    tools = [{"type": "function", "function": {"name": "f", **said}} for said in ({}, {"description": "The tide"})]
    request = parse_chat(json.dumps({"model": "tiny", "messages": [USER], "tools": tools[:1]}).encode())
    ids = await chat_prompt(ServedModel(engine), request.messages, request.tools, goes_on=False)
    assert b"Tools:f: ." in b"".join(bytes([token]) if token < 256 else b"." for token in ids)
    template = loaded(source)
    assert "f: The tide" in "".join(piece for piece in template.render([USER], tools[1:]) if isinstance(piece, str))
    assert "description" not in str(loaded(NATIVE).render([USER], tools[:1])), "where nothing fails, nothing is added"
    whole = loaded(source.replace("t.function.description }}", "t.function.description }}{{ t.function | tojson }}"))
    for tool, said in zip(tools, ("", "The tide"), strict=True):
        shown = "".join(piece for piece in whole.render([USER], [tool]) if isinstance(piece, str))
        assert f'{{"name": "f", "description": "{said}"}}' in shown, "in the order in which others write the members"
