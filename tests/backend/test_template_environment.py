"""What chat templates find is what they find in transformers; the heavy suite asks transformers itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2
import pytest

from lacre_backend.api.template.environment import Raised, given, template_environment

VALUE = {"b": "é<1>", "a": [1, None]}


def rendered(source: str, **values: Any) -> str:
    environment = template_environment()
    return environment.rendered(environment.compiled(source), values)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("tojson", '{"b": "é<1>", "a": [1, null]}'),
        ("tojson(ensure_ascii=False)", '{"b": "é<1>", "a": [1, null]}'),
        ("tojson(ensure_ascii=True)", '{"b": "\\u00e9<1>", "a": [1, null]}'),
        ("tojson(True)", '{"b": "\\u00e9<1>", "a": [1, null]}'),
        ("tojson(separators=(',', ':'))", '{"b":"é<1>","a":[1,null]}'),
        ("tojson(separators=[',', ':'])", '{"b":"é<1>","a":[1,null]}'),
        ("tojson(sort_keys=True)", '{"a": [1, null], "b": "é<1>"}'),
        ("tojson(indent=1)", '{\n "b": "é<1>",\n "a": [\n  1,\n  null\n ]\n}'),
        ("tojson(indent='-')", '{\n-"b": "é<1>",\n-"a": [\n--1,\n--null\n-]\n}'),
        ("tojson(false, 0, (',', ': '), true)", '{\n"a": [\n1,\nnull\n],\n"b": "é<1>"\n}'),
    ],
)
def test_tojson(call: str, text: str) -> None:
    assert rendered(f"{{{{ v | {call} }}}}", v=VALUE) == text


def test_generation_is_what_is_inside() -> None:
    source = "{% for m in l %}[{% generation %}\n{{ m }}-{{ loop.index }}{% set x = 1 %}{% endgeneration %}]{{ x }}{% endfor %}"
    assert rendered(source, l=["a", "b"]) == "[a-1][b-2]"
    assert rendered("{%- generation -%} a {%- endgeneration -%} b") == "ab"


def test_an_open_generation_does_not_compile() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        template_environment().compiled("{% generation %}a")


def test_messages_are_given_as_transformers_gives_them() -> None:
    message = {"role": "assistant", "content": "a", "name": None, "tool_calls": None}
    assert given(message) == {"role": "assistant", "content": "a"}
    for name in ("reasoning_content", "thinking", "reasoning"):
        told = given({**message, name: "r"})
        assert told["reasoning_content"] == told["thinking"] == told[name] == "r"
    assert given({"thinking": "t", "reasoning_content": "r"}) == {"thinking": "t", "reasoning_content": "r"}


def test_loop_controls() -> None:
    assert rendered(
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ) == ("023")


def test_blocks_are_trimmed() -> None:
    assert rendered("  {% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"


def test_strftime_now_is_local_and_has_no_zone() -> None:
    before = datetime.now().strftime("%d %b %Y")
    assert rendered("{{ strftime_now('%d %b %Y%Z%z') }}") in (before, datetime.now().strftime("%d %b %Y"))


def test_raise_exception_speaks() -> None:
    with pytest.raises(Raised, match=r"^No system message$"):
        rendered("{{ raise_exception('No system message') }}")


def test_dict_and_namespace() -> None:
    source = (
        "{% set n = namespace(self=1, b=dict(x=2)) %}{% set n.c = 3 %}{{ n.self }}{{ n.b.x }}{{ n.c }}{{ dict.fromkeys('a') }}"
    )
    assert rendered(source) == "123{'a': None}"
    for source in ("{{ namespace(_a=1) }}", "{% set n = namespace() %}{% set n._a = 1 %}", "{{ namespace({'__html__': 1}) }}"):
        with pytest.raises(jinja2.TemplateError):
            rendered(source)


@pytest.mark.parametrize(
    "source", ["{{ 'a' | from_json }}", "{% do 1 %}", "{% trans %}a{% endtrans %}", "{{ now() }}", "{% include 'a' %}"]
)
def test_what_transformers_lacks(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError)):
        rendered(source)
