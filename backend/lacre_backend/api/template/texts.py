"""Whether each text of a conversation comes out of a chat template, and whether the template wants texts or lists of parts.

A template is a program: that it renders says nothing about what it left out. Many print a system message only where it comes
first, or nothing that an assistant said beside a call. Nobody would notice but by odd answers.

Rules
- What a template does is seen by rendering. In place of each text stands another that is as long and begins and ends with a
  word of our own, which nothing else spells. It has the tags of the text too, at which a template might cut.
- A template that leaves out what the simplest conversation says, in one of the roles, is not loaded.
- Of each request the same conversation is rendered once more with such words, and is refused if one is missing.
- What a template cuts out of a text, such as an assistant's reasoning of earlier turns, is its own affair.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final

Message = Mapping[str, Any]  # role, content, and what tools add: Hugging Face's `tool_calls`, `tool_call_id`
Tools = Sequence[Mapping[str, Any]] | None
Rendering = Callable[[Sequence[Message], Tools], str]  # raises `TemplateRefused`


class TemplateRefused(Exception):
    """The template does not take these messages; the text is the template's own, for the caller."""


class TextLost(TemplateRefused):
    """It would leave out what a message says. what: which one."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"it would leave out {what}" + (f". {remedy}" if remedy else ""))
        self.what = what


class Form(Enum):
    """What a template takes as a message's content: a text, a list of one part, a list of parts, or a text or such a list."""

    TEXT = 1
    ONE_PART = 2
    PARTS = 3
    EITHER = 4


# What templates look for in texts: `</think>`, `<|im_end|>`, `[INST]`
_TAG: Final = re.compile(r"</?[A-Za-z_]{1,32}>|<\|[^|<>]{1,40}\|>|\[/?[A-Z_]{2,32}\]")
_MOST_TAGS: Final = 64  # of one text, each once: more than any template looks for
# At load: longer than a title, and of several paragraphs.
_LONG: Final = "so\n\non " * 1000


class Words:
    """Words that stand for texts. Found in whatever case a template writes them."""

    def __init__(self) -> None:
        self._begin = "w" + secrets.token_hex(12)
        self._any = re.compile(self._begin + "x[0-9]+x")
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"{self._begin}x{self._count}x"

    def instead(self, text: str, *, tags: bool = True) -> tuple[str, tuple[str, ...]]:
        """A text that is as long, and the words in it. tags: with those of the text."""
        first = self.next()
        kept = dict.fromkeys(itertools.islice((tag[0] for tag in _TAG.finditer(text)), _MOST_TAGS)) if tags else {}
        if len(text) <= len(first) and not kept and "\n" not in text:
            return first, (first,)
        last = self.next()
        begin = " ".join((first, *kept, ""))
        filler = "so\n\non " if "\n" in text else "so on "
        room = max(len(text) - len(begin) - len(last), 0)
        return begin + (filler * (room // len(filler) + 1))[:room] + last, (first, last)

    def found(self, rendered: str) -> frozenset[str]:
        """Those that are in a text; in one pass, for there may be thousands, and it may be long."""
        return frozenset(self._any.findall(rendered.lower()))


def as_text(content: Any) -> Any:
    """The parts of a content as one text; what is none as it is."""
    return "".join(part["text"] for part in content) if isinstance(content, list | tuple) else content


def as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def shaped(messages: Sequence[Message], forms: Mapping[str, Form]) -> list[Message]:
    """With contents in the form that is wanted for each role."""
    return [_shaped(message, forms.get(message["role"], Form.EITHER)) for message in messages]


def _shaped(message: Message, form: Form) -> Message:
    content = message.get("content")
    match form:
        case Form.TEXT:
            wanted = as_text(content)
        case Form.ONE_PART:
            wanted = as_parts(as_text(content))
        case Form.PARTS:
            wanted = as_parts(content)
        case Form.EITHER:
            wanted = content
    return message if wanted is content else {**message, "content": wanted}


# At load


def form_of(role: str, sample: Sequence[Message], tools: Tools, render: Rendering) -> Form | None:
    """sample: a conversation whose last message of that role is to be tried. None: it refuses that role, in either form.

    Raises `TextLost`.
    """
    words = Words()
    (first, of_first), (second, of_second), beside = words.instead(_LONG), words.instead(_LONG), words.next()
    at = max(i for i, message in enumerate(sample) if message["role"] == role)

    def tried(content: Any) -> str | None:
        messages = [{**message, "content": content} if i == at else message for i, message in enumerate(sample)]
        with contextlib.suppress(TemplateRefused):
            return render(messages, tools)
        return None

    def takes(rendered: str | None, *wanted: str) -> bool:
        """Not if it writes down the list itself, as `{{ message.content }}` does."""
        found = words.found(rendered or "")
        return rendered is not None and found.issuperset(wanted) and beside not in found

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text, "beside": beside}

    text, one, two = tried(first), tried([part(first)]), tried([part(first), part(second)])
    if takes(text, *of_first):
        return Form.EITHER if one == text and takes(two, *of_first, *of_second) else Form.TEXT
    if takes(one, *of_first):
        return Form.PARTS if takes(two, *of_first, *of_second) else Form.ONE_PART
    if text is not None:
        raise TextLost(f"what a message of the role '{role}' says")
    return None


# Of each request


def check_texts(messages: Sequence[Message], tools: Tools, render: Rendering, rendered: str, *, describes: bool) -> None:
    """rendered: what became of these messages. describes: the template writes what tools are for. Raises `TextLost`."""
    words = Words()
    standing: list[tuple[str, str, int]] = []  # a word, the text that it stands for, and the message's place
    instead = [_instead(message, i, words, standing) for i, message in enumerate(messages)]
    described = tools and [{**tool, "function": {**tool["function"], "description": words.next()}} for tool in tools]
    try:
        spelled = render(instead, described)
    except TemplateRefused:  # it looks into the texts: then these themselves must be there
        missing = next((place for _, text, place in standing if text.strip() not in rendered), None)
    else:
        found = words.found(spelled)
        missing = next((place for word, _, place in standing if word not in found), None)
        if describes and not all(tool["function"]["description"] in found for tool in described or ()):
            raise TextLost("a tool")
    if missing is not None:
        raise _lost(messages[missing], missing)


def _instead(message: Message, place: int, words: Words, standing: list[tuple[str, str, int]]) -> Message:
    def word(text: str) -> str:
        if not text.strip():
            return text
        # An assistant's reasoning may be cut, at its tags.
        made, found = words.instead(text, tags=message["role"] != "assistant")
        standing.extend((each, text, place) for each in found)
        return made

    written = dict(message)
    match message.get("content"):
        case str(text):
            written["content"] = word(text)
        case [*parts]:
            written["content"] = [{**part, "text": word(part["text"])} for part in parts]
    if message.get("tool_calls"):
        written["tool_calls"] = [_call(call, word) for call in message["tool_calls"]]
    return written


def _call(call: Mapping[str, Any], word: Callable[[str], str]) -> dict[str, Any]:
    """A call with other arguments; its name stays, for templates may look it up."""
    function = call["function"]
    arguments = function["arguments"]
    first = arguments if isinstance(arguments, str) else next(iter(arguments), "") if isinstance(arguments, Mapping) else ""
    made = word(first)
    if made == first:  # they say nothing
        return dict(call)
    return {**call, "function": {**function, "arguments": made if isinstance(arguments, str) else {made: made}}}


def _lost(message: Message, place: int) -> TextLost:
    match message["role"]:
        case "system" if place > 0:
            return TextLost("the text of a system message that is not the first message", "Put it first")
        case "assistant" if message.get("tool_calls"):
            return TextLost("what an assistant says beside a call, or the call", "Leave the text out")
        case role:
            return TextLost(f"what a message of the role '{role}' says")
