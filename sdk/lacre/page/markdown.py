"""A model's Markdown as nodes that the page builds elements from. No HTML is made, so none of a model's can survive.

A node is a text, or `[tag, children]`, or `[tag, children, attributes]`. The page has its own list of tags and attributes.

Rules:
- HTML, link definitions and images are text. A link that is not to the web or to a mailbox is text as well.
- A link shows where it leads: a model must not hide that.
- A *seam* is a place in the text where another worker resumed the answer. It appears inside the text if that changes nothing
  else, and otherwise after its block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from lacre.chat.blocks import ended_blocks

MAX_TEXT: Final = 256 * 1024  # characters that are parsed; a longer text stays plain
MAX_SEAMS: Final = 32
Node = str | list[Any]

_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
# Headings of an answer are below the page's own.
_TAGS: Final = {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h6", "h5": "h6", "h6": "h6"}
_SCHEMES: Final = frozenset({"http", "https", "mailto"})
_LANGUAGE: Final = re.compile(r"[A-Za-z0-9+#._-]{1,24}")
_ALIGNED: Final = {"text-align:left": "left", "text-align:center": "center", "text-align:right": "right"}
_MARK: Final = "\ue000"  # private use: stands for a seam while the text is parsed


def blocks(text: str, seams: Sequence[int] = ()) -> list[Node]:
    """The top-level nodes. seams: places in the text, in characters, in order."""
    text = text.replace(_MARK, "�").replace("\0", "�")
    if len(text) > MAX_TEXT:
        return [["pre", [["code", [text]]]], *(["seam", []] for _ in seams)]
    plain = _parsed(text)
    seams = sorted(min(max(seam, 0), len(text)) for seam in seams[:MAX_SEAMS])
    if not seams:
        return [node for node, _ in plain]
    marked = [node for node, _ in _parsed(_with_marks(text, seams))]
    found = [_unmarked(node) for node in marked]
    same = [node for node, _ in found] == [_unmarked(node)[0] for node, _ in plain]
    if same and sum(count for _, count in found) == len(seams):
        return marked
    return _between(plain, [text.count("\n", 0, seam) for seam in seams])


class GrowingAnswer:
    """Renders an answer as it grows, and says which of its blocks changed. Finished blocks are not parsed again."""

    def __init__(self) -> None:
        self._done: list[Node] = []
        self._begun = 0  # where the unfinished part begins in the text
        self._shown: list[str] = []

    def changed(self, text: str, seams: Sequence[int]) -> tuple[int, list[Node]]:
        """The first changed block's number, and all blocks from it on. text: all of it so far."""
        end = self._begun + ended_blocks(text[self._begun :])
        self._done += blocks(text[self._begun : end], [s - self._begun for s in seams if self._begun <= s < end])
        self._begun = end
        late = [s - end for s in seams if s >= end]
        return self._difference([*self._done, *blocks(text[end:], late)])

    def _difference(self, new: list[Node]) -> tuple[int, list[Node]]:
        written = [json.dumps(node) for node in new]
        same = 0
        while same < min(len(written), len(self._shown)) and written[same] == self._shown[same]:
            same += 1
        self._shown = written
        return same, new[same:]


def _parsed(text: str) -> list[tuple[Node, int]]:
    """The top-level nodes, and the line after each."""
    found: list[tuple[Node, int]] = []
    stack: list[tuple[Token, list[Node]]] = []
    children: list[Node] = []
    end = 0
    for token in _PARSER.parse(text):
        if token.level == 0 and token.map is not None:
            end = token.map[1]
        if token.nesting == 1:
            stack.append((token, children))
            children = []
        elif token.nesting == -1:
            begun, outside = stack.pop()
            outside += children if begun.hidden else [_element(begun, children)]  # hidden: a paragraph of a tight list
            children = outside
        else:
            children += _leaf(token)
        if not stack and children:
            found += [(node, end) for node in children]
            children = []
    return found


def _element(begun: Token, children: list[Node]) -> Node:
    attributes: dict[str, Any] = {}
    if begun.tag == "ol" and isinstance(first := begun.attrs.get("start"), int):
        attributes["start"] = first
    if begun.tag in ("th", "td") and (aligned := _ALIGNED.get(str(begun.attrs.get("style")))) is not None:
        attributes["align"] = aligned
    tag = _TAGS.get(begun.tag, begun.tag)
    return [tag, children, attributes] if attributes else [tag, children]


def _leaf(token: Token) -> list[Node]:
    match token.type:
        case "inline":
            return _inline(token.children or [])
        case "fence" | "code_block":
            named = _LANGUAGE.match(token.info.replace(_MARK, "").strip())
            return [["pre", [["code", _split(token.content)]], {"lang": named[0]} if named else {}]]
        case "hr":
            return [["hr", []]]
        case _:
            return _split(token.content)


def _inline(tokens: Iterable[Token]) -> list[Node]:
    stack: list[tuple[str, dict[str, Any], list[Node]]] = []
    children: list[Node] = []
    for token in tokens:
        if token.nesting == 1:
            stack.append((token.tag, dict(token.attrs), children))
            children = []
        elif token.nesting == -1:
            tag, attributes, outside = stack.pop()
            outside += _link(str(attributes.get("href", "")), children) if tag == "a" else [[tag, children]]
            children = outside
        elif token.type == "image":
            children += _link(str(token.attrs.get("src", "")), ["image: ", *_split(token.content)])
        elif token.type in ("softbreak", "hardbreak"):
            children.append(["br", []])
        elif token.type == "code_inline":
            children.append(["code", _split(token.content)])
        else:
            children += _split(token.content)
    return children


def _link(target: str, children: list[Node]) -> list[Node]:
    """A link, with its host or its address behind it if the text does not show it."""
    target = target.replace("%EE%80%80", "").replace(_MARK, "")
    try:
        parts = urlsplit(target)
    except ValueError:
        return [*children, f" ({target})"]
    if parts.scheme.lower() not in _SCHEMES or not (parts.netloc or parts.path):
        return [*children, f" ({target})"] if target else children
    shown = "".join(child for child in children if isinstance(child, str))
    where = parts.netloc or parts.path
    told: list[Node] = [] if shown in (target, where) else [["small", [f" ({where})"]]]
    return [["a", children, {"href": target}], *told]


def _split(text: str) -> list[Node]:
    """A text, with a node for each mark in it."""
    found: list[Node] = []
    for i, piece in enumerate(text.split(_MARK)):
        found += ([["seam", []]] if i else []) + ([piece] if piece else [])
    return found


def _with_marks(text: str, seams: Sequence[int]) -> str:
    """A mark at each seam, moved to the end of its word: inside it, a mark could change what the text means."""
    for seam in reversed(seams):
        space = re.compile(r"\s|$").search(text, seam)
        place = seam if space is None else space.start()
        text = text[:place] + _MARK + text[place:]
    return text


def _unmarked(node: Node) -> tuple[Node, int]:
    """The node without seams, and how many it had."""
    if isinstance(node, str):
        return node, 0
    if node[0] == "seam":
        return "", 1
    children: list[Node] = []
    total = 0
    for child in node[1]:
        plain, count = _unmarked(child)
        total += count
        if isinstance(plain, str) and children and isinstance(children[-1], str):
            children[-1] += plain
        elif plain != "":
            children.append(plain)
    return [node[0], children, *node[2:]], total


def _between(plain: list[tuple[Node, int]], lines: Sequence[int]) -> list[Node]:
    """The nodes, with each seam after the block of its line."""
    found: list[Node] = []
    left = list(lines)
    for node, end in plain:
        found.append(node)
        while left and left[0] < end:
            found.append(["seam", []])
            left.pop(0)
    return [*found, *(["seam", []] for _ in left)]
