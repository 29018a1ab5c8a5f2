"""Turns messages into prompt tokens through the model's chat template. A user's text can never steer the model.

The rule: **no text of a request ever becomes a control token.**

Why it is needed: chat templates are programs that join constants ("<|im_start|>") and the users' strings. In the joined string
it is no longer visible who wrote which part.

How it works:
1. At load, every control token's literal in the template's *source* is replaced by a mark. A mark contains 128 random bits that
   never leave this object.
2. After rendering, a mark becomes one control token. Everything else is tokenized as plain text, in which llama.cpp recognizes
   no control token (`parse_special` off).

So a user who types "<|im_end|>" gets the letters. The same holds for a literal made of parts: one half in each of two messages,
or text around something that the template cuts out. Escaping literals in the users' strings would not cover that case.

Some templates compose their control tokens ('<|' + role + '|>') or inspect their own constants, so that marks would change what
they render. Loading detects them: it renders sample conversations both ways. For them, the literals that the samples show to be
composed are recognized in the rendered text. Before rendering, each such literal in a user's string is swapped for its own
mark, which becomes plain text afterwards. For these templates only, one gap remains: a literal that the template builds from
two halves of adjacent users' strings.

The result is the same as Hugging Face's `apply_chat_template`. `template/texts.py` checks that no text is silently omitted.

The template comes with the model. It runs in Jinja's sandbox, so it can neither reach nor change anything of this process.
`template/bounds.py` limits its rounds, its time and its text.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import jinja2

from lacre.errors import SettingsError
from lacre_backend.api.template.calls import TOOL, UNDESCRIBED, USED, USUAL, described, learned
from lacre_backend.api.template.environment import Raised, given, template_environment
from lacre_backend.api.template.pieces import Piece, any_of, joined
from lacre_backend.api.template.texts import (
    Form,
    Message,
    Rendering,
    TemplateRefused,
    TextLost,
    Tools,
    check_texts,
    form_of,
    shaped,
)
from lacre_backend.api.template.wishes import NO_WISHES, Wishes, efforts_of
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.thoughts import thought_format
from lacre_backend.engine.protocol import ControlToken, ModelInfo

__all__ = ["ChatTemplate", "Message", "Piece", "TemplateRefused", "Tools"]

_GIVEN: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_SPEAKING_OF_A_TOOL: Final[tuple[tuple[Message, ...], Tools]] = (({"role": "user", "content": "Hello"},), (TOOL,))
_SAMPLES: Final[tuple[tuple[tuple[Message, ...], Tools], ...]] = (
    (({"role": "user", "content": "Hello"},), None),
    (({"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}), None),
    (({"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}, {"role": "user", "content": "Three"}), None),
    _SPEAKING_OF_A_TOOL,
    (USED, (TOOL,)),
)


# The simplest conversations in which each role speaks.
_USER: Final[Message] = {"role": "user", "content": "Hello"}
_SYSTEM: Final[Message] = {"role": "system", "content": "Be kind"}
_ANSWER: Final[Message] = {"role": "assistant", "content": "Two"}
_SPEAKING: Final[Mapping[str, tuple[tuple[Message, ...], Tools]]] = {
    "user": ((_USER,), None),
    "system": ((_SYSTEM, _USER), None),
    "assistant": ((_USER, _ANSWER, _USER), None),
    "tool": (USED, (TOOL,)),
}


class ChatTemplate:
    """A model's loaded chat template. Raises `SettingsError` if it does not compile or omits text of messages.

    calls: the model's format of calls, if the template shows calls in a known format. manner: how it takes them.
    thoughts: its format of reasoning, if the template knows one. variables: what it reads beside the messages.
    """

    def __init__(self, model: ModelInfo, markers: Sequence[ControlToken] = ()) -> None:
        """markers: tokens that steer the model although its file calls them text; see `markers_of`."""
        if model.chat_template is None:
            raise SettingsError(f"The model {model.name} has no chat template.")
        self._model = model
        self._nonce = secrets.token_hex(16)
        self._mark = re.compile(self._nonce + "([cu])([0-9]+);")
        self.control = (*model.control_tokens, *markers)
        self._control = {token.text: token for token in self.control if token.text}
        self._literal = any_of(self._control)
        self._by_id = {token.id: token for token in self.control}
        self._composed: re.Pattern[str] | None = None
        marked = self._literal.sub(lambda match: self._control_mark(match[0]), model.chat_template)
        self._forms: dict[str, Form] = {}
        self._no_tools: Tools = None
        try:
            self._environment = template_environment()
            plain = self._environment.compiled(model.chat_template)
            self._template = self._environment.compiled(marked)
        except jinja2.TemplateError:
            raise self._unusable("does not compile") from None
        self._learn_forms(plain)
        if not self._same_as(plain):
            self._template = plain
            self._composed = self._literal
        elif composed := self._composed_literals():
            self._composed = any_of(composed)
        written = "".join(self._outcome(self._template, *each) for each in _SAMPLES)
        self.thoughts = thought_format(model.chat_template, written, _ANSWER["content"])
        self.variables = self._read_variables(model.chat_template)
        self._efforts = efforts_of(model.chat_template, self._takes)
        self._wants_description = self._fails_without_description()
        self._describes = TOOL["function"]["description"] in self._outcome(self._template, *_SPEAKING_OF_A_TOOL)
        self.manner = USUAL
        self.calls = self._learn_calls(plain)
        self._check_whole()

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        add_generation_prompt: bool = True,
        wishes: Wishes = NO_WISHES,
    ) -> tuple[Piece, ...]:
        """The prompt, up to the beginning of the assistant's answer. Raises `TemplateRefused`.

        A content is a text or a list of text parts. The template gets it in the form that it expects for its role.
        """

        def run(messages: Sequence[Message], tools: Tools) -> str:
            return self._run(self._template, messages, tools, add_generation_prompt=add_generation_prompt, beside=beside)

        if tools is not None and self._wants_description:
            tools = [described(tool) for tool in tools]
        taken = self.manner.applied([*map(given, messages)])
        try:
            swapped, told = self._swapped(shaped(taken, self._forms)), self._swapped(tools)
            beside = self._swapped(wishes.values(self.variables, self._efforts))
        except RecursionError:
            raise TemplateRefused("they nest too deeply") from None
        rendered = run(swapped, told)
        check_texts(swapped, told, run, rendered, describes=self._describes)
        return self._pieces(rendered)

    def constant(self, text: str) -> str:
        """The program's own text, for use in a message: literals of control tokens in it become control tokens."""
        return self._literal.sub(lambda match: self._control_mark(match[0]), text)

    def pieces(self, text: str) -> tuple[Piece, ...]:
        """The program's own text, as pieces of a prompt."""
        return self._pieces(self.constant(text))

    # Marks: `c` and the id for a control token of the template; `u` and the id for a literal from a user's string

    def _control_mark(self, literal: str) -> str:
        return f"{self._nonce}c{self._control[literal].id};"

    def _swap(self, text: str) -> str:
        if self._composed is None:
            return text
        return self._composed.sub(lambda match: f"{self._nonce}u{self._control[match[0]].id};", text)

    def _swapped(self, value: Any) -> Any:
        """Swaps literals in every string inside."""
        match value:
            case str():
                return self._swap(value)
            case Mapping():
                return {self._swap(key): self._swapped(each) for key, each in value.items()}
            case list() | tuple():
                return [self._swapped(each) for each in value]
        return value

    def _pieces(self, rendered: str) -> tuple[Piece, ...]:
        # re.split with two groups gives: text, kind, id, text, kind, id, ..., text.
        parts = self._mark.split(rendered)
        pieces: list[Piece] = list(self._recognised(parts[0]))
        for kind, token_id, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            token = self._by_id[int(token_id)]
            pieces += [token if kind == "c" else token.text, *self._recognised(text)]
        if any(self._nonce in piece.lower() for piece in pieces if isinstance(piece, str)):
            raise TemplateRefused("it changes a text that contains the characters of a control token")
        return tuple(joined(pieces))

    def _recognised(self, text: str) -> list[Piece]:
        """Text outside of marks: plain, except for control tokens that the template composed."""
        if self._composed is None:
            return [text]
        pieces: list[Piece] = []
        end = 0
        for match in self._composed.finditer(text):
            pieces += [text[end : match.start()], self._control[match[0]]]
            end = match.end()
        return [*pieces, text[end:]]

    # Rendering

    def _run(
        self,
        template: jinja2.Template,
        messages: Any,
        tools: Any,
        *,
        add_generation_prompt: bool = True,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """beside: values of `variables`."""
        values = {
            **beside,
            "messages": messages,
            "tools": self._no_tools if tools is None else tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        for name, token in (("bos_token", self._model.bos), ("eos_token", self._model.eos)):
            if token is not None:
                # Both templates get marks here: the beginning-of-sequence token is not a user's text.
                values[name] = self._control_mark(token.text) if token.text in self._control else token.text
        try:
            return self._environment.rendered(template, values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # Only `raise_exception` has a text for the caller. Other errors depend on how the template is written.
            said = str(error) if isinstance(error, Raised) else "it fails on them"
            raise TemplateRefused(self._mark.sub(lambda match: self._by_id[int(match[2])].text, said)) from None

    def _outcome(self, template: jinja2.Template, messages: Sequence[Message], tools: Tools) -> str:
        """A sample's rendering with its marks turned back into literals, or the template's refusal."""
        try:
            rendered = self._run(template, shaped(messages, self._forms), tools)
        except TemplateRefused as refusal:
            return f"refused: {refusal}"
        return self._mark.sub(lambda match: self._by_id[int(match[2])].text, rendered)

    # Analysing the template

    def _read_variables(self, source: str) -> frozenset[str]:
        """The variables that the template reads and this class does not give."""
        return self._environment.variables(source) - _GIVEN

    def _takes(self, beside: Mapping[str, Any]) -> bool:
        """Whether the template takes these values of its variables."""
        values = {name: value for name, value in beside.items() if name in self.variables}
        try:
            self._run(self._template, shaped((_USER,), self._forms), None, beside=values)
        except TemplateRefused:
            return False
        return bool(values)

    def _learn_forms(self, plain: jinja2.Template) -> None:
        """Learns the form of each role's content. A refused role has none; each request that uses it gets the reason."""

        def run(messages: Sequence[Message], tools: Tools) -> str:
            return self._run(plain, shaped(messages, self._forms), tools)

        self._no_tools = self._simplest(run)
        for role, (sample, tools) in _SPEAKING.items():
            try:
                form = form_of(role, sample, tools, run)
            except TextLost as lost:
                if role == "tool":
                    continue  # it supports no tools, so it never gets this role
                raise self._unusable(f"omits {lost.what}") from None
            if form is not None:
                self._forms[role] = form

    def _simplest(self, run: Rendering) -> Tools:
        """The value that means "no tools" to the template: none, or an empty list if it needs one. Raises `SettingsError`."""
        for tools in (None, ()):
            for messages in ((_USER,), (_SYSTEM, _USER)):
                try:
                    run(messages, tools)
                except TemplateRefused as refusal:
                    said = str(refusal)
                else:
                    return tools
        raise self._unusable(f"does not take a single message ({said})")

    def _check_whole(self) -> None:
        """Checks all supported roles in one conversation. If one with a call loses a text, the template takes no calls."""
        spoken = [message for message in (_SYSTEM, _USER, _ANSWER, _USER) if message["role"] in self._forms]
        try:
            self._check(spoken, None)
        except TextLost as lost:
            raise self._unusable(f"omits {lost.what}") from None
        if self.calls is None:
            return
        try:
            self._check(USED, (TOOL,) if self.manner.listed else None)
        except TextLost:
            self.calls, self.manner = None, USUAL

    def _check(self, messages: Sequence[Message], tools: Tools) -> None:
        """Raises `TextLost`. If the template refuses it, each request that uses it gets the reason."""
        try:
            self.render(messages, tools)
        except TextLost:
            raise
        except TemplateRefused:
            return

    def _unusable(self, why: str) -> SettingsError:
        return SettingsError(f"The chat template of {self._model.name} {why}. Convert the model again, with another template.")

    def _same_as(self, plain: jinja2.Template) -> bool:
        return all(self._outcome(self._template, *sample) == self._outcome(plain, *sample) for sample in _SAMPLES)

    def _fails_without_description(self) -> bool:
        """Some templates append to a tool's description, and fail if there is none."""

        def taken(tool: Mapping[str, Any]) -> bool:
            try:
                self._run(self._template, shaped((_USER,), self._forms), (tool,))
            except TemplateRefused:
                return False
            return True

        return not taken(UNDESCRIBED) and taken(described(UNDESCRIBED))

    def _learn_calls(self, plain: jinja2.Template) -> CallFormat | None:
        found = learned(partial(self._outcome, self._template))
        if found is None:
            return None
        form, self.manner = found
        if self.manner != USUAL:  # the sample with which the form of results was to be learned was not as it takes calls

            def run(messages: Sequence[Message], tools: Tools) -> str:
                return self._run(plain, shaped(messages, self._forms), tools)

            with contextlib.suppress(TextLost):
                result = form_of("tool", self.manner.applied(USED), (TOOL,) if self.manner.listed else None, run)
                self._forms |= {} if result is None else {"tool": result}
        return form

    def _composed_literals(self) -> dict[str, ControlToken]:
        found: dict[str, ControlToken] = {}
        for sample in _SAMPLES:
            try:
                pieces = self._pieces(self._run(self._template, shaped(sample[0], self._forms), sample[1]))
            except TemplateRefused:
                continue
            for piece in pieces:
                if isinstance(piece, str):
                    found |= {literal: self._control[literal] for literal in self._literal.findall(piece)}
        return found
