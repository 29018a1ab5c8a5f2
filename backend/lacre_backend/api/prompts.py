"""Turns requests into prompt tokens: through the chat template, with tools as the template or the fallback formats them.

Rules:
- A template that supports tools gets them. Every other model learns of them in the system message, in the format of `HERMES`.
  Calls and results of earlier turns then become text of the assistant and the user, because such templates know no other roles.
- An assistant's text beside a call becomes its own message before the call if the template would omit it.
- If the template refuses or omits a later system message, all of them become one at the beginning.
- A prompt that cannot fit is refused before it is tokenized. A text that the tokenizer cannot read is refused by its field's
  name.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from lacre_backend.api import ceilings
from lacre_backend.api.errors import RequestRefused, shutting_down, text_refused
from lacre_backend.api.image_marks import ImageMarks
from lacre_backend.api.messages import Message, check_media
from lacre_backend.api.parsed import check_size
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.template.pieces import (
    Piece,
    answer_tokens,
    begun,
    embedding_tokens,
    joined,
    pair_tokens,
    shown_tokens,
    text_tokens,
)
from lacre_backend.api.template.prompt import ChatTemplate, TemplateRefused
from lacre_backend.api.template.texts import TextLost, as_text
from lacre_backend.api.template.wishes import NO_WISHES, Wishes
from lacre_backend.api.tools.format import HERMES, CallFormat
from lacre_backend.api.tools.parts import SHORT_ID
from lacre_backend.api.tools.request import Tool
from lacre_backend.api.tools.thoughts import Start, ThoughtFormat
from lacre_backend.engine.protocol import EngineClosed, PlacedImage, TaskKind, TextRefused

_Written = dict[str, Any]
_Pieces = tuple[Piece, ...]
_TAIL: Final = 8  # pieces of a prompt in which a template may open the reasoning


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, its images, and where in an answer the model's text begins."""

    tokens: list[int] = field(repr=False)
    start: Start = Start.SPEAKING
    images: tuple[PlacedImage, ...] = field(default=(), repr=False)


async def chat_prompt(served: ServedModel, messages: Sequence[Message], tools: Sequence[Tool], *, goes_on: bool) -> list[int]:
    """The tokens of `chat_start` without wishes, of texts alone."""
    check_media(messages, served.engine.model.name)
    return (await chat_start(served, messages, tools, goes_on=goes_on)).tokens


async def chat_start(
    served: ServedModel, messages: Sequence[Message], tools: Sequence[Tool], *, goes_on: bool, wishes: Wishes = NO_WISHES
) -> Prompt:
    """goes_on: whether the last message is the beginning of the answer. Raises `RequestRefused`."""
    template, model = served.template, served.engine.model
    if template is None:
        raise RequestRefused(f"The model `{model.name}` has no chat template. Use /v1/completions.", param="model")
    check_media(messages, model.name, images=model.images is not None)
    marks = ImageMarks()
    written = [message.for_template(marks.of) for message in messages]
    told = [tool.for_template() for tool in tools]
    check_size(written)  # with the arguments of calls, which the body contains as text
    for name in wishes.unknown(template.variables):
        raise RequestRefused(
            f"The model's chat template reads no variable '{name}'.", code="unknown_parameter", param="chat_template_kwargs"
        )
    beginning = as_text(written.pop()["content"]) if goes_on else ""
    try:
        pieces = _with_systems(template, written, told, wishes)
    except TemplateRefused as refusal:
        said = str(refusal).rstrip(".!")
        raise RequestRefused(f"The model's chat template does not take these messages: {said}.", param="messages") from None
    thoughts = template.thoughts
    said = "".join(piece if isinstance(piece, str) else piece.text for piece in pieces[-_TAIL:])
    spoken = Start.SPEAKING if beginning else Start.FRESH
    start = spoken if thoughts is None else thoughts.start(said, beginning)
    if beginning:
        answer = thoughts.answer if thoughts is not None else template.calls.answer if template.calls is not None else ""
        pieces = (*pieces, *template.pieces(answer), beginning)
    ceilings.check_length(model, sum(len(piece.encode()) for piece in pieces if isinstance(piece, str)), "messages")
    with _named("messages"):
        shown = await marks.shown(model, joined(pieces))
        tokens, images = await shown_tokens(served.engine, shown, template.control)
        return Prompt(tokens, start, images)


async def text_prompt(served: ServedModel, text: str) -> list[int]:
    """A prompt without messages. Raises `RequestRefused`."""
    ceilings.check_length(served.engine.model, len(text.encode()), "prompt")
    with _named("prompt"):
        return await text_tokens(served.engine, text)


def given_tokens(served: ServedModel, tokens: Sequence[int], param: str) -> list[int]:
    """A prompt of the model's own token ids, as `/v1/tokenize` gives them. Raises `RequestRefused`.

    It may begin as the tokenizer begins a text. No other control token may be in it: only a template writes those.
    """
    model = served.engine.model
    plain = tokens[1:] if model.bos is not None and tokens[:1] == [model.bos.id] else tokens
    if not all(0 <= token < model.n_vocab and token not in model.control_ids for token in plain):
        raise RequestRefused(
            f"'{param}' holds a token that the model does not have, or one that is not text.", code="invalid_value", param=param
        )
    return begun(model, list(tokens))


async def infill_prompt(
    served: ServedModel, before: str, after: str, param: str, *, files: Sequence[tuple[str, str]] = (), begun_with: str = ""
) -> list[int]:
    """A prompt whose answer stands between two texts. param: the caller's field, for errors. files: names and texts of others
    that the model may look at. begun_with: the beginning of the answer. Raises `RequestRefused`.
    """
    model = served.engine.model
    marks = model.infill
    if marks is None:
        raise RequestRefused(
            f"The model `{model.name}` cannot fill in a middle ('{param}'): its file has no tokens for it. Name another model.",
            code="unsupported_value",
            param=param,
        )
    others = [f"{name}\n{text}" for name, text in files]
    ceilings.check_length(model, sum(len(text.encode()) for text in (*others, before, after, begun_with)), param)
    steering = [*model.control_tokens, marks.before, marks.after, marks.middle, *filter(None, [marks.separator])]

    async def tokens(text: str) -> list[int]:
        return await answer_tokens(served.engine, text, steering) if text else []

    with _named(param):
        found: list[int] = []
        for other in others:
            found += [*([] if marks.separator is None else [marks.separator.id]), *await tokens(other)]
        found += [marks.before.id, *await tokens(before), marks.after.id, *await tokens(after), marks.middle.id]
        return begun(model, [*found, *await tokens(begun_with)])


async def given_answer(served: ServedModel, text: str) -> list[int]:
    """An answer that a caller gives to be scored. Raises `RequestRefused`."""
    model, template = served.engine.model, served.template
    ceilings.check_length(model, len(text.encode()), "answer")
    with _named("answer"):
        return await answer_tokens(served.engine, text, model.control_tokens if template is None else template.control)


async def embedding_inputs(served: ServedModel, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, including those added around it. Raises `RequestRefused`."""
    for text in texts:  # white space may cost no token
        ceilings.check_length(served.engine.model, len("".join(text.split()).encode()), "input")
    with _named("input"):
        return await embedding_tokens(served.engine, texts)


async def rerank_inputs(served: ServedModel, query: str, documents: Sequence[str]) -> list[list[int]]:
    """The tokens of the query with each document. Raises `RequestRefused`."""
    for document in documents:
        ceilings.check_length(served.engine.model, len("".join((query + document).split()).encode()), "documents")
    with _named("documents"):
        return await pair_tokens(served.engine, query, documents)


async def plain_tokens(served: ServedModel, text: str) -> list[int]:
    """A text's tokens as the model would read it: as a prompt, or to embed it. Raises `RequestRefused`."""
    if TaskKind.EMBED in served.engine.model.kinds:
        (tokens,) = await embedding_inputs(served, [text])
        return tokens
    return await text_prompt(served, text)


def call_format(served: ServedModel) -> CallFormat:
    """The model's format of calls."""
    known = None if served.template is None else served.template.calls
    return known or HERMES


def thought_format(served: ServedModel) -> ThoughtFormat | None:
    """The model's format of reasoning, if it reasons."""
    return None if served.template is None else served.template.thoughts


@contextlib.contextmanager
def _named(param: str) -> Iterator[None]:
    """Turns the tokenizer's refusal into one with the field's name. Raises `RequestRefused`."""
    try:
        yield
    except TextRefused:
        raise text_refused(param) from None
    except EngineClosed:
        raise shutting_down() from None


def _with_systems(template: ChatTemplate, written: list[_Written], told: list[_Written], wishes: Wishes) -> _Pieces:
    """Rendered as it is, or with one system message if the template takes no later one. Raises `TemplateRefused`."""
    try:
        return _rendered(template, written, told, wishes)
    except TemplateRefused as refusal:
        systems = [message for message in written if message["role"] == "system"]
        text = "\n\n".join(as_text(message["content"]) for message in systems)
        others = [message for message in written if message["role"] != "system"]
        if systems not in ([], written[:1]):
            return _rendered(template, [{**systems[0], "content": text}, *others], told, wishes)
        if not systems or not isinstance(refusal, TextLost):
            raise
        # Some write the system message with the last user's, and lose it behind a result.
        return _rendered(template, _begun(others, text), told, wishes)


def _begun(written: Sequence[_Written], text: str) -> list[_Written]:
    """With a text before that of the last user."""
    at = max((i for i, message in enumerate(written) if message["role"] == "user"), default=-1)
    return [
        {**message, "content": f"{text}\n\n{as_text(message['content'])}"} if i == at else message
        for i, message in enumerate(written)
    ]


def _rendered(template: ChatTemplate, written: list[_Written], told: list[_Written], wishes: Wishes) -> _Pieces:
    render, form = partial(template.render, wishes=wishes), template.calls
    if form is None:
        spoken = _spoken(template, written)
        return _told(render, spoken, _instructions(template, told, HERMES)) if told else render(spoken)
    written = _with_short_ids(written) if form.short_ids else written
    if told and template.manner.listed:
        render = partial(render, tools=told)
    elif told:
        render = partial(_told, render, instructions=_instructions(template, told, form))
    try:
        return render(written)
    except TextLost:
        apart = list(_apart(written))
        if len(apart) == len(written):
            raise
        return render(apart)


def _told(render: Callable[[Sequence[_Written]], _Pieces], written: Sequence[_Written], instructions: str) -> _Pieces:
    """With the tools in the system message, or before the first message if the template takes none."""
    first = written[0]
    if first["role"] == "system":
        return render([{**first, "content": f"{as_text(first['content'])}\n\n{instructions}"}, *written[1:]])
    try:
        return render([{"role": "system", "content": instructions}, *written])
    except TemplateRefused:  # some support no system message
        return render([{**first, "content": f"{instructions}\n\n{as_text(first['content'])}"}, *written[1:]])


def _with_short_ids(written: Sequence[_Written]) -> list[_Written]:
    """Ids as Mistral's templates take them. Other servers and models have longer ones."""

    def short(call_id: str) -> str:
        if len(call_id) == SHORT_ID and call_id.isascii() and call_id.isalnum():
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:SHORT_ID]

    renamed = []
    for message in written:
        named = dict(message)
        if message.get("tool_calls"):
            named["tool_calls"] = [{**call, "id": short(call["id"])} for call in message["tool_calls"]]
        if "tool_call_id" in message:
            named["tool_call_id"] = short(message["tool_call_id"])
        renamed.append(named)
    return renamed


def _apart(written: Sequence[_Written]) -> Iterator[_Written]:
    """Moves an assistant's text beside calls into a message before them."""
    for message in written:
        if message.get("tool_calls") and message["content"]:
            yield {"role": message["role"], "content": message["content"]}
            yield {**message, "content": ""}
        else:
            yield message


def _spoken(template: ChatTemplate, written: Sequence[_Written]) -> list[_Written]:
    """Calls and results as text. Consecutive results become one message, because many templates require alternating turns."""
    spoken: list[_Written] = []
    for is_result, group in itertools.groupby(written, lambda message: message["role"] == "tool"):
        if is_result:
            content = "\n".join(_result(template, as_text(message["content"])) for message in group)
            spoken.append({"role": "user", "content": content})
        else:
            spoken += [_without_calls(template, message) for message in group]
    return spoken


def _without_calls(template: ChatTemplate, message: _Written) -> _Written:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    said = [as_text(message["content"])] if message["content"] else []
    texts = [*said, *(_call(template, call) for call in calls)]
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": "\n".join(texts)}


# The fallback's own words. `constant` marks only these: a caller's text between them stays as it is.

_BEFORE_TOOLS: Final = (
    "You can call functions. Each line between <tools> and </tools> describes one, with a JSON schema.\n<tools>\n"
)
_AFTER_TOOLS: Final = "\n</tools>\nTo call a function, write its name and its arguments as JSON, in this form:\n"
_RESULTS: Final = "\nIts result comes between <tool_response> and </tool_response>. "
_IN_WORDS: Final = "Answer in plain words where no function helps."


def _instructions(template: ChatTemplate, told: Sequence[_Written], form: CallFormat) -> str:
    """form: in which the model shall call; the fallback's is taught with its results."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in told)
    shape = form.begin + form.written("NAME", "{ARGUMENTS}") + form.end
    results = _RESULTS if template.calls is None else "\n"
    return template.constant(_BEFORE_TOOLS) + listed + template.constant(_AFTER_TOOLS + shape + results + _IN_WORDS)


def _call(template: ChatTemplate, call: Mapping[str, Any]) -> str:
    arguments = call["arguments"]
    data = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    begin, middle, end = map(template.constant, (HERMES.open, HERMES.middle, HERMES.close))
    return f"{begin}{call['name']}{middle}{data}{end}"


def _result(template: ChatTemplate, text: str) -> str:
    return f"{template.constant('<tool_response>')}\n{text}\n{template.constant('</tool_response>')}"
