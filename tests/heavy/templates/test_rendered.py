"""What we render from chat templates is what transformers' `apply_chat_template` renders, byte for byte; else it is refused.

Each template is rendered twice: once as if its control tokens were plain text, and once with them as tokens of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from heavy.conftest import Environment
from heavy.templates.conversations import CONVERSATIONS, IN_PARTS, WORD, Messages, Tools, said
from lacre.errors import SettingsError
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.prompts import chat_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import ChatCompletionRequest, parse_chat
from lacre_backend.api.template.calls import USUAL, Manner
from lacre_backend.api.template.prompt import ChatTemplate, TemplateRefused
from lacre_backend.engine.protocol import ControlToken, ModelInfo
from parts.echo_engine import EchoEngine

BY_TRANSFORMERS: Final = Path(__file__).with_name("by_transformers.py")
BOS, EOS = ControlToken(1, "<s>"), ControlToken(2, "</s>")
# How most vocabularies write theirs
CONTROL: Final = re.compile(r"<\|[^|<>{}'\"\s]{1,40}\|>|<｜[^<>{}'\"\s]{1,40}｜>|\[/?[A-Z_]{3,30}\]|<(?:start|end)_of_turn>")
MANNERS: Final = tuple(Manner(*way) for way in ((True, False), (False, True), (True, True)))
DUMPED: Final = re.compile(r"""['"]type['"]: ['"]text['"]""")  # a list of parts, written down as such
AS_PARTS: Final = "as parts: "


@dataclass(frozen=True, slots=True)
class Case:
    """One conversation for one template."""

    template: str
    name: str
    messages: Messages
    tools: Tools
    answering: bool

    def missing(self, text: str) -> set[str]:
        """Words of it that are not in a text."""
        return {word for word in WORD.findall(json.dumps(self.messages)) if word not in text}


def cases(templates: dict[str, str]) -> Iterator[Case]:
    for template, answering in itertools.product(templates, (True, False)):
        for name, (messages, tools) in CONVERSATIONS.items():
            yield Case(template, name, messages, tools, answering)
        for name, messages in IN_PARTS.items():
            yield Case(template, AS_PARTS + name, messages, None, answering)


def joined(messages: Messages, *roles: str) -> Messages:
    """With the parts of these roles as one text."""
    return [
        {**each, "content": "".join(part["text"] for part in each["content"])} if each["role"] in roles else each
        for each in messages
    ]


@dataclass(frozen=True, slots=True)
class Theirs:
    """What transformers renders for a case, as it is and in other forms. None: it refuses.

    as_text: with each content as one text. system_as_text: with those of system messages. without_tools: with an empty list of
    tools, where there are none. in_manners: with calls in each other manner.
    """

    as_it_is: str | None
    as_text: str | None
    system_as_text: str | None
    without_tools: str | None
    in_manners: dict[Manner, str | None]


def by_transformers(python: str, asked: list[dict[str, Any]]) -> list[str | None]:
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    command = [python, "-P", str(BY_TRANSFORMERS)]
    done = subprocess.run(command, input=json.dumps(asked), check=True, stdout=subprocess.PIPE, text=True, env=env)
    return [told.get("text") for told in json.loads(done.stdout)]


def asking(source: str, messages: Messages, tools: Tools, *, answering: bool) -> dict[str, Any]:
    tokens = {"bos_token": BOS.text, "eos_token": EOS.text}
    return {**tokens, "template": source, "messages": messages, "tools": tools, "add_generation_prompt": answering}


@pytest.fixture(scope="module")
def theirs(environment: Environment, templates: dict[str, str]) -> list[tuple[Case, Theirs]]:
    asked, found = [], list(cases(templates))
    for case in found:
        in_parts = case.name.startswith(AS_PARTS)
        whole = joined(case.messages, "system", "user", "assistant") if in_parts else case.messages
        partly = joined(case.messages, "system") if in_parts else case.messages
        forms = ((case.messages, case.tools), (whole, case.tools), (partly, case.tools), (whole, case.tools or []))
        asked += [asking(templates[case.template], *form, answering=case.answering) for form in forms]
        used = [manner.applied(case.messages) for manner in MANNERS]
        asked += [asking(templates[case.template], [*each], case.tools, answering=case.answering) for each in used]
    texts, n = by_transformers(environment("templates"), asked), 4 + len(MANNERS)
    each = [texts[n * i : n * i + n] for i in range(len(found))]
    return [
        (case, Theirs(*told[:4], dict(zip(MANNERS, told[4:], strict=True)))) for case, told in zip(found, each, strict=True)
    ]


def model(name: str, source: str, *, tokens: bool) -> ModelInfo:
    literals = sorted({*CONTROL.findall(source)} - {BOS.text, EOS.text}) if tokens else []
    control = (BOS, EOS, *(ControlToken(i, literal) for i, literal in enumerate(literals, 3)))
    plain = EchoEngine(name=name).model
    return dataclasses.replace(plain, chat_template=source, bos=BOS, eos=EOS, control_tokens=control)


def ours(template: ChatTemplate, case: Case) -> str:
    pieces = template.render(case.messages, case.tools, add_generation_prompt=case.answering)
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


def wanted(case: Case, told: Theirs, manner: Manner = USUAL) -> set[str]:
    """What may come out of ours. manner: how the template takes calls."""
    if manner in told.in_manners and any(message.get("tool_calls") for message in case.messages):
        return {text for text in (told.in_manners[manner],) if text is not None}
    if not case.name.startswith(AS_PARTS):
        return {text for text in (told.as_it_is or told.without_tools,) if text is not None}
    taken = told.as_it_is is not None and not DUMPED.search(told.as_it_is) and not case.missing(told.as_it_is)
    if taken and len({message["role"] for message in case.messages}) == 1:
        return {told.as_it_is or ""}
    # Of several roles the template may take parts from some.
    forms = (told.as_it_is, told.system_as_text, told.as_text or told.without_tools)
    return {text for text in forms if text is not None and not DUMPED.search(text)}


@pytest.mark.parametrize("tokens", [False, True], ids=["plain", "with control tokens"])
def test_each_is_equal_or_refused_by_name(templates: dict[str, str], theirs: list[tuple[Case, Theirs]], tokens: bool) -> None:
    loaded: dict[str, ChatTemplate | SettingsError] = {}
    for name, source in templates.items():
        try:
            loaded[name] = ChatTemplate(model(name, source, tokens=tokens))
        except SettingsError as error:
            loaded[name] = error
    kinds: Counter[str] = Counter()
    equal = dict.fromkeys(templates, 0)
    wrong: list[str] = []
    for case, told in theirs:
        template = loaded[case.template]
        manner = USUAL if isinstance(template, SettingsError) else dataclasses.replace(template.manner, listed=True)
        expected = wanted(case, told, manner)
        label = f"{case.template}: {case.name}, {'' if case.answering else 'not '}answering"
        if isinstance(template, SettingsError):
            kinds["not loaded"] += 1
            if expected or case.template not in str(template):
                wrong.append(f"{label}: {template}")
            continue
        try:
            text = ours(template, case)
        except TemplateRefused as refusal:
            left_out = str(refusal).startswith("it would omit") and any(map(case.missing, expected))
            kinds["left out, and refused" if expected else "refused by both"] += 1
            if expected and not left_out:
                wrong.append(f"{label}: {refusal}, though transformers renders {expected}")
        else:
            if manner.silent and not expected:  # transformers passes no null, for which R1's template waits
                kinds["of null"] += 1
                expected = {text}
            kinds["equal" if text in expected else "different"] += 1
            equal[case.template] += text == told.as_it_is
            if text not in expected:
                wrong.append(f"{label}: {text!r} is not {expected}")
            elif missing := case.missing(text):
                wrong.append(f"{label}: {missing} were lost")
    alike = [name for name, count in equal.items() if count >= len(CONVERSATIONS)]
    print(f"{len(templates)} templates, {len(alike)} of them equal in most conversations. Renderings: {dict(kinds)}")
    assert not wrong, "\n".join(wrong[:20])
    assert len(alike) >= 60


def served(name: str, source: str) -> ServedModel | None:
    engine = EchoEngine(name=name, n_ctx=2**20)
    engine.model = dataclasses.replace(engine.model, chat_template=source)
    try:
        return ServedModel(engine)
    except SettingsError:
        return None


def asked(messages: Messages, tools: Tools) -> ChatCompletionRequest:
    """As a client of OpenAI's API sends it."""
    sent = [{name: value for name, value in each.items() if (each["role"], name) != ("tool", "name")} for each in messages]
    for i, message in enumerate(sent):
        if calls := message.get("tool_calls"):
            functions = [{**c["function"], "arguments": json.dumps(c["function"]["arguments"])} for c in calls]
            sent[i] = {**message, "tool_calls": [{**c, "function": f} for c, f in zip(calls, functions, strict=True)]}
    return parse_chat(json.dumps({"model": "m", "messages": sent, **({"tools": tools} if tools else {})}).encode())


async def test_nothing_is_lost_between_a_client_and_the_model(templates: dict[str, str]) -> None:
    """With calls and tools as text, where the template knows none: each word is in the prompt, or the request is refused."""
    conversations = {**CONVERSATIONS, **{AS_PARTS + name: (messages, None) for name, messages in IN_PARTS.items()}}
    kinds: Counter[str] = Counter()
    for template, source in templates.items():
        model = served(template, source)
        for name, (messages, tools) in conversations.items() if model else ():
            request = asked(messages, tools)
            try:
                ids = await chat_prompt(model, request.messages, request.tools, goes_on=False)
            except RequestRefused as refusal:
                assert refusal.param == "messages"
                kinds["refused"] += 1
                continue
            text = bytes(token for token in ids if token < 256).decode()
            kinds["whole"] += 1
            names = {tool["function"]["name"] for tool in tools or ()}
            lost = Case(template, name, messages, tools, answering=True).missing(text) | {
                each for each in names if each not in text
            }
            assert not lost, f"{template}: {name}: {lost}"
    print(dict(kinds))
    assert kinds["refused"] < kinds["whole"] / 20


def test_those_that_are_not_loaded(templates: dict[str, str]) -> None:
    """It asks for a variable that neither transformers nor we have."""
    name = "fireworks-ai-llama-3-firefunction-v2"
    with pytest.raises(SettingsError, match=name):
        ChatTemplate(model(name, templates[name], tokens=True))


SAID: Final[Messages] = [said("user", "Olá"), said("assistant", '<b>"x"')]
EACH: Final = "{% for m in messages %}BODY{% endfor %}"
SMALL: Final = {
    "generation": "{% generation %}\n  {{ m.content }}{% set x = 1 %}\n{% endgeneration %}\n{{ x }}",
    "generation, trimmed": " {%- generation -%} {{ m.content }} {%- endgeneration -%} ",
    "tojson": "{{ m | tojson }}",
    "tojson, ASCII": "{{ m.content | tojson(ensure_ascii=True) }}",
    "tojson by position": "{{ m | tojson(true, 3, (';', '='), true) }}",
    "tojson, sorted": "{{ m | tojson(sort_keys=true) }}",
    "tojson, separators": "{{ m | tojson(separators=(',', ':')) }}",
    "tojson, indent": "{{ m | tojson(indent=4) }}{{ m | tojson(indent='..') }}",
    "loop controls": "{% if loop.index > 9 %}{% break %}{% endif %}{{ m.content }}",
    "blocks": "\n    {# a remark #}\n    {% if m %}\n    {{ m.content }}\n  {% endif %}\nend\n",
    "tokens": "{{ bos_token }}{{ m.content }}{{ eos_token }}{{ pad_token is defined }}",
    "what is given": "{{ m.content }}{{ tools is none }}{{ documents is none }}{{ functions is defined }}"
    "{{ add_generation_prompt }}",
    "dict and namespace": "{% set n = namespace(t='', d=dict(a=1)) %}{% set n.t = n.t ~ m.content %}{{ n.t }}{{ n.d }}"
    "{{ dict.fromkeys(['b']) }}",
    "markup": "{{ (m.content | safe) ~ '<' }}{{ (m.content | e) + '<' }}{{ m.content | safe + '<&' }}",
    "today": "{{ m.content }}{{ strftime_now('%d %b %Y %Z%z') }}",
    "numbers": "{{ m.content }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ '%03d' % 5 }}{{ 1 / 4 }}",
    "methods": "{{ m.content.strip().split(' ') | join('_') }}{{ '{}-{a}'.format(1, a=2) }}",
    "values that are no texts": "{{ m.content }}{{ [1, none, 2.5, true] }}{{ {'a': [()]} }}{{ m.missing }}{{ [m] | length }}",
}


# What else templates are written with: one on each line.
FEATURES: Final = Path(__file__).with_name("features.jinja").read_text(encoding="utf-8").splitlines()
TALK: Final[Messages] = [said("system", "Be <b>"), said("user", " Olá 'x' "), said("assistant", "Yes\n"), said("user", "Z")]


def test_what_templates_are_written_with(environment: Environment) -> None:
    texts = by_transformers(environment("templates"), [asking(source, TALK, None, answering=True) for source in FEATURES])
    for source, text in zip(FEATURES, texts, strict=True):
        template = ChatTemplate(model("small", source, tokens=False))
        assert ours(template, Case("small", source, TALK, None, answering=True)) == text, source


@pytest.fixture(scope="module")
def small(environment: Environment) -> dict[str, str | None]:
    asked = [asking(EACH.replace("BODY", source), SAID, None, answering=True) for source in SMALL.values()]
    return dict(zip(SMALL, by_transformers(environment("templates"), asked), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_what_templates_find(small: dict[str, str | None], name: str) -> None:
    template = ChatTemplate(model("small", EACH.replace("BODY", SMALL[name]), tokens=True))
    assert ours(template, Case("small", name, SAID, None, answering=True)) == small[name]
