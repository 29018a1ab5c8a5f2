"""The messages of a conversation, parsed once, including members that clients add when they send answers back.

Rules:
- A client sends an answer back as it received it, or as its own object: with nulls, empty lists and its own members.
  Bookkeeping members (`BOOKKEEPING`) are dropped, and null counts as absent. Any other member is refused by name.
- A message's content is never dropped: a refusal becomes the message's text. Images and audio become a
  `MediaPart`, and files are refused.
- Errors name the field in OpenAI's notation (`messages[0].content`), never its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from lacre_backend.api import media
from lacre_backend.api.errors import RequestRefused, unsupported
from lacre_backend.api.parsed import Echoed, missing
from lacre_backend.api.tools.request import MAX_CALLS, MAX_ID, MessageToolCall

MAX_MESSAGES: Final = 2048
MAX_PARTS: Final = 256  # content parts of one message
MAX_NAME: Final = 256

# Members that clients and servers add to a message. No prompt depends on them.
BOOKKEEPING: Final = frozenset(
    {
        # openai's parsed and streamed messages; Azure's
        "parsed", "annotations", "index", "logprobs", "finish_reason", "content_filter_results", "content_filter_offsets",
        "end_turn", "context", "weight",
        # a whole answer as one message
        "id", "object", "created", "model", "usage", "system_fingerprint", "service_tier", "status", "stop_reason",
        # reasoning in forms other than text, for which templates have no name
        "reasoning", "reasoning_details", "reasoning_items", "reasoning_text", "thinking", "thinking_blocks",
        # LangChain, LiteLLM, the AI SDK, Mistral's and Cohere's clients
        "additional_kwargs", "response_metadata", "usage_metadata", "invalid_tool_calls", "example", "lc_kwargs",
        "provider_specific_fields", "providerOptions", "provider_options", "providerMetadata", "provider_metadata",
        "experimental_providerMetadata", "extra_content", "citations", "tool_plan", "metadata", "cache_control",
        "prompt_cache_breakpoint", "createdAt", "created_at", "timestamp",
    }
)  # fmt: skip
# Content that is not text; an empty value is harmless.
_OTHER_CONTENT: Final = ("function_call", "audio", "images", "files", "attachments", "experimental_attachments")


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return [_said(part) for part in value]
    return value


def _said(part: Any) -> Any:
    """A part in which an assistant refuses says why."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _none_if_empty(value: Any) -> Any:
    return None if value == [] else value


class TextPart(Echoed):
    ignored = BOOKKEEPING

    type: Literal["text"]
    text: str


class MediaPart(TextPart):
    """An image or audio in place of a text. No body can hold one: the parsers of parts make it."""

    held: media.Media

    @classmethod
    def of(cls, found: media.Media) -> MediaPart:
        return cls.model_construct(type="text", text="", held=found)


class Message(Echoed):
    """One message of a conversation.

    - content: may be omitted if the assistant calls tools or refuses.
    - tool_call_id: the call that a `tool` message answers.
    - reasoning_content: the reasoning behind the answer, for templates that show it to the model again.
    """

    ignored = BOOKKEEPING

    @model_validator(mode="before")
    @classmethod
    def _reasoned(cls, raw: Any) -> Any:
        """`reasoning` is another name for `reasoning_content`, which many clients send back."""
        if isinstance(raw, dict) and raw.get("role") == "assistant" and raw.get("reasoning_content") is None:
            reasoning = raw.get("reasoning")
            return {**raw, "reasoning_content": reasoning if isinstance(reasoning, str) else None}
        return raw

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(min_length=1, max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[
        Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS)] | None, BeforeValidator(_none_if_empty)
    ] = None
    tool_call_id: Annotated[str, Field(max_length=MAX_ID)] | None = None

    def for_template(self, mark: Callable[[media.Media], str] = lambda _: "") -> dict[str, Any]:
        """`developer` is OpenAI's newer name for `system`; templates know the old one. A single part becomes a text.

        mark: the text that stands for an image.
        """
        role = "system" if self.role == "developer" else self.role
        parts = self.content or ()
        texts = [text for part in parts if (text := mark(part.held) if isinstance(part, MediaPart) else part.text)]
        if self.refusal:
            texts.append(self.refusal)
        content = [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)
        written: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            written["name"] = self.name
        if self.reasoning_content is not None:
            written["reasoning_content"] = self.reasoning_content
        if self.tool_calls is not None:
            written["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            written["tool_call_id"] = self.tool_call_id
        return written


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def check_known(raw: Any) -> None:
    """Refuses by name what OpenAI supports and this server does not. raw: the `messages` of a body. Raises `RequestRefused`."""
    for i, message in enumerate(raw if isinstance(raw, list) else []):
        if isinstance(message, dict):
            _check_message(message, f"messages[{i}]")


def _check_message(message: dict[str, Any], path: str) -> None:
    if message.get("role") == "function":
        raise RequestRefused("Use the role 'tool'.", code="unsupported_value", param=f"{path}.role")
    for name in _OTHER_CONTENT:
        if message.get(name) not in (None, []):
            raise unsupported(f"{path}.{name}")
        message.pop(name, None)
    if message.get("content") == [] and message.get("role") in ("assistant", "tool"):
        message["content"] = ""
    if isinstance(content := message.get("content"), list) and len(content) <= MAX_PARTS:
        message["content"] = [_with_media(part, message, f"{path}.content[{i}]") for i, part in enumerate(content)]


def _with_media(part: Any, message: dict[str, Any], at: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in (*media.FILES, *media.VIDEOS):
        raise media.not_read(kind, at)
    if kind not in media.PARTS:
        return part
    found = media.of_chat(part, at)
    if message.get("role") != "user":
        raise media.misplaced(at)
    return MediaPart.of(found)


def check_media(messages: Sequence[Message], model: str, *, images: bool = False) -> None:
    """Every prompt of messages passes here. images: whether the model reads them; none hears. Raises `RequestRefused`."""
    found = [part.held for message in messages for part in message.content or () if isinstance(part, MediaPart)]
    if len(found) > media.MAX_MEDIA:
        raise RequestRefused(
            f"The messages hold {len(found)} images and recordings. At most {media.MAX_MEDIA} are read.",
            code="array_above_max_length",
            param=found[media.MAX_MEDIA].at,
        )
    for each in found:
        if each.kind != "image" or not images:
            raise media.not_taken(model, each)


def check_turns(messages: Sequence[Message]) -> None:
    """Checks that content is present where required, that each tool call is answered, and that each answer has a call. Raises
    `RequestRefused`.
    """
    waiting: list[str] = []
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        _check_role(message, path)
        if message.role == "tool":
            if message.tool_call_id is None:
                raise missing(f"{path}.tool_call_id")
            if message.tool_call_id not in waiting:
                raise RequestRefused(
                    f"'{path}' answers no tool call of the assistant's message before it.", param=f"{path}.tool_call_id"
                )
            waiting.remove(message.tool_call_id)
        else:
            _check_answered(waiting, path)
            waiting = [call.id for call in message.tool_calls or ()]
        if message.content is None and message.tool_calls is None and message.refusal is None:
            raise missing(f"{path}.content")
    _check_answered(waiting, "messages")


def has_a_beginning(messages: Sequence[Message]) -> bool:
    """Whether the last message begins an answer that may continue."""
    last = messages[-1]
    return len(messages) > 1 and last.role == "assistant" and last.tool_calls is None


def _check_answered(waiting: Sequence[str], path: str) -> None:
    if waiting:
        raise RequestRefused(f"The tool call '{waiting[0]}' has no message of role 'tool' that answers it.", param=path)


def _check_role(message: Message, path: str) -> None:
    """Checks members that only one role may have."""
    of_assistant = ("tool_calls", "refusal", "reasoning_content")
    others = of_assistant if message.role != "assistant" else ()
    for name in (*others, *(("tool_call_id",) if message.role != "tool" else ())):
        if getattr(message, name) is not None:
            raise RequestRefused(f"'{name}' does not belong to the role '{message.role}'.", param=f"{path}.{name}")
