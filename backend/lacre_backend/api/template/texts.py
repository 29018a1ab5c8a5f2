"""Checks that a chat template renders each text of a conversation, and whether it expects texts or lists of parts.

A template is a program: it may render without error and still omit text. Many print a system message only at the beginning, or
drop an assistant's text beside a call. The only sign would be strange answers.

Rules:
- The check renders the template. Each text is replaced by another of the same length that begins and ends with a unique word.
  It keeps the text's tags, at which a template might cut.
- A template that omits text of the simplest conversation, in any role, is not loaded.
- Each request's conversation is rendered once more with such words. It is refused if one is missing.
- A template may cut parts out of a text, such as an assistant's reasoning in earlier turns.
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
    """The template rejects these messages. The text is the template's own, for the caller."""


class TextLost(TemplateRefused):
    """The template would omit a message's text. what: which text."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"it would omit {what}" + (f". {remedy}" if remedy else ""))
        self.what = what


class Form(Enum):
    """The form of content that a template expects: a text, a list of one part, a list of parts, or either."""

    TEXT = 1
    ONE_PART = 2
    PARTS = 3
    EITHER = 4


# Tags that templates search for in texts: `</think>`, `<|im_end|>`, `[INST]`
_TAG: Final = re.compile(r"</?[A-Za-z_]{1,32}>|<\|[^|<>]{1,40}\|>|\[/?[A-Z_]{2,32}\]")
_MOST_TAGS: Final = 64  # per text, each once: more than any template searches for
# At load: longer than a title, and with several paragraphs.
_LONG: Final = "so\n\non " * 1000


class Words:
    """Words that stand for texts. They are found in any case that a template writes."""

    def __init__(self) -> None:
        self._begin = "w" + secrets.token_hex(12)
        self._any = re.compile(self._begin + "x[0-9]+x")
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"{self._begin}x{self._count}x"

    def instead(self, text: str, *, tags: bool = True) -> tuple[str, tuple[str, ...]]:
        """A text of the same length, and the words in it. tags: whether it keeps the text's tags."""
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
        """The words in a text. One pass, because there may be thousands in a long text."""
        return frozenset(self._any.findall(rendered.lower()))


def as_text(content: Any) -> Any:
    """The parts of a content as one text. Other values stay as they are."""
    return "".join(part["text"] for part in content) if isinstance(content, list | tuple) else content


def as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def shaped(messages: Sequence[Message], forms: Mapping[str, Form]) -> list[Message]:
    """The messages, with contents in the form expected for each role."""
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
    """sample: a conversation; its last message of that role is tried. None: the template refuses that role in both forms.

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
        """False if it prints the list itself, as `{{ message.content }}` does."""
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
        raise TextLost(f"the text of a message with the role '{role}'")
    return None


# For each request


def check_texts(messages: Sequence[Message], tools: Tools, render: Rendering, rendered: str, *, describes: bool) -> None:
    """rendered: the result for these messages. describes: whether the template writes descriptions of tools. Raises
    `TextLost`.
    """
    words = Words()
    standing: list[tuple[str, str, int]] = []  # a word, the text that it stands for, and the message's place
    instead = [_instead(message, i, words, standing) for i, message in enumerate(messages)]
    described = tools and [{**tool, "function": {**tool["function"], "description": words.next()}} for tool in tools]
    try:
        spelled = render(instead, described)
    except TemplateRefused:  # it inspects the texts: then these themselves must be present
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
        # An assistant's reasoning may be cut at its tags.
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
    """A call with other arguments. Its name stays, because templates may look it up."""
    function = call["function"]
    arguments = function["arguments"]
    first = arguments if isinstance(arguments, str) else next(iter(arguments), "") if isinstance(arguments, Mapping) else ""
    made = word(first)
    if made == first:  # they are empty
        return dict(call)
    return {**call, "function": {**function, "arguments": made if isinstance(arguments, str) else {made: made}}}


def _lost(message: Message, place: int) -> TextLost:
    match message["role"]:
        case "system" if place > 0:
            return TextLost("the text of a system message that is not the first message", "Put it first")
        case "assistant" if message.get("tool_calls"):
            return TextLost("an assistant's text beside a call, or the call", "Omit the text")
        case role:
            return TextLost(f"the text of a message with the role '{role}'")
