"""Examples of a user's own task, one JSON object a line: `lacre model choose --examples FILE`.

Rules:
- Every error names the file and the line. Unknown members are errors: a misspelt one would silently count for nothing.
- Size, number and length are bounded before any model reads a text.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lacre.errors import SettingsError

MOST_EXAMPLES: Final = 1000  # each model answers all of them: minutes for a small one
MOST_BYTES: Final = 16 * 2**20  # of the file
MOST_TEXTS: Final = 100  # documents, or other texts, of one example
Example = TypeVar("Example")

_FORBID: Final = ConfigDict(extra="forbid", allow_inf_nan=False)
_QUOTES: Final = "\"'`*“”‘’„«» "
_ENDS: Final = ".,;:!?…。！？" + _QUOTES


class ModelTask(StrEnum):
    """What a model is for."""

    CHAT = "chat"
    EMBED = "embed"
    RERANK = "rerank"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class ExampleMessage:
    """One message of a conversation."""

    __pydantic_config__ = _FORBID

    role: Literal["system", "user", "assistant"]
    content: Text


@dataclass(frozen=True, slots=True)
class ChatExample:
    """Either `prompt`, one message of a user, or `messages`. expected: each of these answers is right; empty: none is given."""

    __pydantic_config__ = _FORBID

    line: int
    prompt: str = ""
    messages: tuple[ExampleMessage, ...] = ()
    expected: Annotated[tuple[Text, ...], BeforeValidator(_as_list)] = ()


@dataclass(frozen=True, slots=True)
class NearestExample:
    """`nearest` should have a vector closer to that of `text` than each of `others`, which are the other lines' by default."""

    __pydantic_config__ = _FORBID

    line: int
    text: Text
    nearest: Text
    others: Annotated[tuple[Text, ...], Field(max_length=MOST_TEXTS)] = ()


@dataclass(frozen=True, slots=True)
class SimilarPair:
    """How similar two texts are, on any scale: the order of all pairs counts."""

    __pydantic_config__ = _FORBID

    line: int
    text: Text
    other: Text
    similarity: float


@dataclass(frozen=True, slots=True)
class RerankExample:
    """right: the document that answers the query, or its number from 0."""

    __pydantic_config__ = _FORBID

    line: int
    query: Text
    documents: Annotated[tuple[Text, ...], Field(min_length=2, max_length=MOST_TEXTS)]
    right: int | Text

    @property
    def index(self) -> int:
        """Of the right document."""
        return self.right if isinstance(self.right, int) else self.documents.index(self.right)


@dataclass(frozen=True, slots=True)
class Examples:
    """All of one kind; the other fields are empty."""

    chat: tuple[ChatExample, ...] = ()
    nearest: tuple[NearestExample, ...] = ()
    similar: tuple[SimilarPair, ...] = ()
    rerank: tuple[RerankExample, ...] = ()


def read_examples(path: Path, task: ModelTask) -> Examples:
    """Raises SettingsError with the number of the line, or OSError."""
    lines = list(_lines(path))
    if not lines:
        raise SettingsError(f"{path} has no example. Write one JSON object a line.")
    if len(lines) > MOST_EXAMPLES:
        raise SettingsError(f"{path} has {len(lines):,} examples; at most {MOST_EXAMPLES:,} are read. Give fewer.")
    if task is ModelTask.CHAT:
        return Examples(chat=tuple(_chat(path, _parsed(path, ChatExample, each)) for each in lines))
    if task is ModelTask.RERANK:
        return Examples(rerank=tuple(_rerank(path, _parsed(path, RerankExample, each)) for each in lines))
    if "similarity" in lines[0]:
        return Examples(similar=_pairs(path, [_parsed(path, SimilarPair, each) for each in lines]))
    return Examples(nearest=_nearest(path, [_parsed(path, NearestExample, each) for each in lines]))


def normalized(text: str) -> str:
    """As answers are compared: without regard to case, white space, and quotes around or punctuation after the answer."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip(_ENDS).lstrip(_QUOTES)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects, each with its line's number. Empty lines are skipped."""
    if path.is_dir():
        raise SettingsError(f"{path} is a folder. Give a file with one JSON object a line.")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise SettingsError(f"{path} is larger than {MOST_BYTES // 2**20} MiB. Give fewer or shorter examples.")
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            raise _wrong(path, number, "it is not UTF-8 text") from None
        except (ValueError, RecursionError):
            raise _wrong(path, number, "it is no JSON object") from None
        if not isinstance(value, dict):
            raise _wrong(path, number, "it is no JSON object")
        if "line" in value:
            raise _wrong(path, number, "`line` is not a member that examples have")
        yield value | {"line": number}


def _parsed(path: Path, kind: type[Example], value: dict[str, Any]) -> Example:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the example"
        unknown = first["type"] == "unexpected_keyword_argument"
        said = "this task's examples have no such member" if unknown else first["msg"][:1].lower() + first["msg"][1:]
        raise _wrong(path, value["line"], f"`{where}`: {said}") from None


def _chat(path: Path, example: ChatExample) -> ChatExample:
    if bool(example.prompt) == bool(example.messages):
        raise _wrong(path, example.line, "give either `prompt` or `messages`")
    if example.messages and example.messages[-1].role == "assistant":
        raise _wrong(path, example.line, "the last message is the assistant's; give that answer as `expected`")
    if not all(map(normalized, example.expected)):
        raise _wrong(path, example.line, "`expected` has an answer without a letter or a digit")
    return example


def _rerank(path: Path, example: RerankExample) -> RerankExample:
    count = len(example.documents)
    if isinstance(example.right, str) and example.right not in example.documents:
        raise _wrong(path, example.line, "`right` is none of the documents")
    if isinstance(example.right, int) and not 0 <= example.right < count:
        raise _wrong(path, example.line, f"`right` is {example.right}; the documents are numbered 0 to {count - 1}")
    return example


def _nearest(path: Path, examples: list[NearestExample]) -> tuple[NearestExample, ...]:
    every = {example.nearest for example in examples}
    for example in examples:
        if example.nearest in example.others or not (example.others or every - {example.nearest}):
            raise _wrong(path, example.line, "give `others`: texts that are less similar than `nearest`")
    return tuple(examples)


def _pairs(path: Path, pairs: list[SimilarPair]) -> tuple[SimilarPair, ...]:
    if len({pair.similarity for pair in pairs}) < 2:
        raise SettingsError(f"{path}: all pairs have the same `similarity`. Give pairs that differ in it.")
    return tuple(pairs)


def _wrong(path: Path, line: int, said: str) -> SettingsError:
    return SettingsError(f"Line {line} of {path}: {said}. docs/choosing.md shows the members.")
