"""A model's Markdown as the page gets it: nodes of listed tags alone, and seams that change nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.page.markdown import MAX_SEAMS, MAX_TEXT, GrowingAnswer, Node, blocks

TAGS = {
    "p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "em", "strong", "s", "br", "hr", "table", "thead", "tbody",
    "tr", "th", "td", "small", "pre", "code", "a", "seam",
}  # fmt: skip
ATTRIBUTES = {"ol": {"start"}, "th": {"align"}, "td": {"align"}, "a": {"href"}, "pre": {"lang"}}
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<iframe srcdoc='<script>'>",
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](java\nscript:alert(1))", "[x](&#106;avascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)", "[x](vbscript:x)", "[x](file:///etc/passwd)", "<javascript:alert(1)>",
    "![x](https://evil.example/pixel.png)", "![x](data:image/svg+xml,<svg onload=alert(1)>)", "![x](javascript:alert(1))",
    "[x]: javascript:alert(1)\n\n[x]", "[x](//evil.example)", "[x](/page/api/state)", "[x](#a)", "[x]()", "[x](http://)",
    "```<script>\nx\n```", '```js" onload="x\nx\n```', "<!-- hidden -->", "<a href='x' style='y'>z</a>", "\x00\x01\ue000",
    "<style>*{display:none}</style>", "[x](https://good.example 'title\" onmouseover=\"alert(1)')", "&lt;script&gt;", "&#0;",
    "| a | b |\n|---|:-:|\n| <b> | [x](javascript:1) |", "[https://bank.example](https://evil.example/login)",
)  # fmt: skip


def walked(node: Node) -> Iterator[Any]:
    yield node
    if isinstance(node, list):
        for child in node[1]:
            yield from walked(child)


def elements(nodes: list[Node]) -> list[Any]:
    return [each for node in nodes for each in walked(node) if isinstance(each, list)]


def shown(nodes: list[Node]) -> str:
    return "".join(each for node in nodes for each in walked(node) if isinstance(each, str))


def bare(node: Node) -> Node:
    """Without seams, and with neighbouring texts as one."""
    if isinstance(node, str):
        return node
    children: list[Node] = []
    for child in map(bare, node[1]):
        if child == "" or (isinstance(child, list) and child[0] == "seam"):
            continue
        if isinstance(child, str) and children and isinstance(children[-1], str):
            children[-1] += child
        else:
            children.append(child)
    return [node[0], children, *node[2:]]


def plain(nodes: list[Node]) -> list[Node]:
    return [bare(node) for node in nodes if not (isinstance(node, list) and node[0] == "seam")]


def check_listed(nodes: list[Node]) -> None:
    json.dumps(nodes)
    for element in elements(nodes):
        tag, attributes = element[0], element[2] if len(element) > 2 else {}
        assert tag in TAGS and set(attributes) <= ATTRIBUTES.get(tag, set()), element
        if tag == "a":
            assert attributes["href"].lower().startswith(("http://", "https://", "mailto:")), element
        if tag == "pre":
            assert attributes.get("lang", "a").replace("+", "").replace("#", "").replace("-", "").replace(".", "").isalnum()


class TestWhatAModelWrites:
    def test_the_usual(self) -> None:
        text = "# One\n\nA **bold** *word*, ~~gone~~ and `x`.\nNext line.\n\n- a\n- b\n  1. c\n\n3. x\n\n"
        text += "> said\n\n---\n\n```py\nx = 1\n```\n"
        assert blocks(text) == [
            ["h3", ["One"]],
            ["p", ["A ", ["strong", ["bold"]], " ", ["em", ["word"]], ", ", ["s", ["gone"]], " and ", ["code", ["x"]], ".",
                   ["br", []], "Next line."]],
            ["ul", [["li", ["a"]], ["li", ["b", ["ol", [["li", ["c"]]]]]]]],
            ["ol", [["li", ["x"]]], {"start": 3}],
            ["blockquote", [["p", ["said"]]]],
            ["hr", []],
            ["pre", [["code", ["x = 1\n"]]], {"lang": "py"}],
        ]  # fmt: skip

    def test_a_table(self) -> None:
        [table] = blocks("| a | b |\n|:--|--:|\n| 1 | **2** |")
        assert table == [
            "table",
            [
                ["thead", [["tr", [["th", ["a"], {"align": "left"}], ["th", ["b"], {"align": "right"}]]]]],
                ["tbody", [["tr", [["td", ["1"], {"align": "left"}], ["td", [["strong", ["2"]]], {"align": "right"}]]]]],
            ],
        ]

    def test_a_link_shows_where_it_leads(self) -> None:
        [[_, found]] = blocks("[bank](https://evil.example/x) <https://a.example> <me@a.example>")
        assert found[0] == ["a", ["bank"], {"href": "https://evil.example/x"}]
        assert found[1] == ["small", [" (evil.example)"]]
        assert ["a", ["https://a.example"], {"href": "https://a.example"}] in found
        assert ["a", ["me@a.example"], {"href": "mailto:me@a.example"}] in found

    @pytest.mark.parametrize("text", HOSTILE, ids=repr)
    def test_nothing_but_listed_nodes(self, text: str) -> None:
        for around in ("{}", "- {}", "> {}", "# {}", "a {} b", "| {} |\n|---|\n| {} |"):
            check_listed(blocks(around.replace("{}", text)))

    def test_hostile_text_stays_visible(self) -> None:
        for text in ("<script>alert(1)</script>", "<!-- hidden -->", "<style>x</style>"):
            assert blocks(text) == [["p", [text]]]
        assert "javascript:alert(1)" in shown(blocks("[x](javascript:alert(1))"))
        assert "evil.example" in shown(blocks("![x](https://evil.example/pixel.png)"))
        assert "hidden" in shown(blocks("[hidden]: https://a.example"))

    @given(st.text(alphabet=st.sampled_from("ab *_`~#>-[]()<>!|\n\t1.\\&;:/\x00\ue000é😀"), max_size=80))
    def test_any_text(self, text: str) -> None:
        check_listed(blocks(text))

    def test_deep_and_long(self) -> None:
        for text in (">" * 5000 + "x", "- " * 3000 + "x", "[" * 5000, "*" * 5000 + "x", "`" * 3000):
            check_listed(blocks(text))
        assert blocks("*" * (MAX_TEXT + 1)) == [["pre", [["code", ["*" * (MAX_TEXT + 1)]]]]]


class TestSeams:
    def test_in_a_text(self) -> None:
        assert blocks("The sea is deep.", [4]) == [["p", ["The sea", ["seam", []], " is deep."]]]

    def test_in_code(self) -> None:
        [[_, [[_, inside]], told]] = blocks("```py\nx = 1\ny = 2\n```", [9])
        assert inside == ["x = 1".replace(" 1", ""), ["seam", []], " 1\ny = 2\n"] or ["seam", []] in inside
        assert told == {"lang": "py"}

    @given(
        st.text(alphabet=st.sampled_from("ab *_`#>-[](x)|\n:"), max_size=60),
        st.lists(st.integers(-5, 80), max_size=3).map(sorted),
    )
    def test_they_change_nothing_else(self, text: str, seams: list[int]) -> None:
        found = blocks(text, seams)
        assert plain(found) == plain(blocks(text))
        assert sum(element[0] == "seam" for element in elements(found)) == len(seams)

    @pytest.mark.parametrize(
        "text", ["| a | b |\n|---|---|\n| 1 | 2 |", "```py\nx\n```", "[a b](https://x.example/y)", "a\n===\n\nb", "**a b**"]
    )
    def test_at_every_place(self, text: str) -> None:
        for place in range(len(text) + 1):
            found = blocks(text, [place])
            assert plain(found) == plain(blocks(text)), place
            assert sum(element[0] == "seam" for element in elements(found)) == 1, place

    def test_too_many(self) -> None:
        found = blocks("a b " * 100, list(range(100)))
        assert sum(element[0] == "seam" for element in elements(found)) == MAX_SEAMS


class TestGrowing:
    TEXT = "One.\n\n- a\n- b\n\n```py\nx = 1\n\ny = 2\n```\n\nLast **word** here."

    @given(st.lists(st.integers(0, len(TEXT)), max_size=12).map(sorted))
    def test_what_the_page_has_is_what_there_is(self, cuts: list[int]) -> None:
        """Whatever the pieces, following the changes gives the last state; and finished parts are as in the whole."""
        growing, held = GrowingAnswer(), list[Node]()
        for cut in [*cuts, len(self.TEXT)]:
            start, changed = growing.changed(self.TEXT[:cut], [])
            assert 0 <= start <= len(held)
            held = held[:start] + changed
        assert held == blocks(self.TEXT)

    def test_only_what_changed_is_sent(self) -> None:
        growing = GrowingAnswer()
        growing.changed("One.\n\nTwo", [])
        assert growing.changed("One.\n\nTwo words", []) == (1, [["p", ["Two words"]]])
        assert growing.changed("One.\n\nTwo words", []) == (2, [])

    def test_a_seam_while_it_grows(self) -> None:
        growing = GrowingAnswer()
        growing.changed("One.\n\nTwo", [])
        _, changed = growing.changed("One.\n\nTwo and three\n\nFour", [9])
        assert changed[0] == ["p", ["Two", ["seam", []], " and three"]]
        assert growing.changed("One.\n\nTwo and three\n\nFour five", [9]) == (2, [["p", ["Four five"]]])
