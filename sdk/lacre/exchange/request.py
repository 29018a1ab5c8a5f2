"""What goes inside the seal: an application's request with everything removed that says who asks.

Headers are taken by allow-list. `Authorization`, cookies, `User-Agent`, `X-Stainless-*` and trace context never go in, and of a
JSON body the fields `user`, `metadata`, `safety_identifier` and `prompt_cache_key` are dropped unless the caller insists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeGuard

from lacre.errors import MessageTooLarge, UsageError
from lacre.exchange.resume_marks import ASK, MEMBER
from lacre.runtime.json_objects import object_in
from lacre.wire.header import MAX_SEALED_REQUEST

DEFAULT_MAX_TOKENS: Final = 512  # what the SDK asks for, for each choice, where the caller does not say; of `http`, KiB
NO_OUTPUT: Final = 1  # the least that `Lacre-Max-Tokens` can say, for actions whose answer holds no tokens
MAX_TOKENS: Final = 2**31 - 1  # the largest ceiling that `Lacre-Max-Tokens` can say
ALLOWED_HEADERS: Final = frozenset({"content-type", "accept", ASK})
# OpenAI's fields that say who asks. `prompt_cache_key` is the newer word for `user`, a pseudonym that stays; what it is for,
# the salt does here, and that changes by the hour.
IDENTIFYING_FIELDS: Final = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Sealing adds the key encapsulation, a tag for each chunk, headers and padding; all of them stay below this.
MAX_CONTENT: Final = MAX_SEALED_REQUEST - 2**17

# What a caller may say of a request whose body cannot: which model it is for, and how much its answer may hold.
_MODEL: Final = "lacre-model"
_MAX_TOKENS: Final = "lacre-max-tokens"

_MODEL_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")  # it stands in a header field outside, for policy
_COUNT: Final = re.compile(r"[1-9][0-9]{0,9}")
# The actions that run a model, by the path that each belongs to.
_RUNS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "complete",
    "/v1/embeddings": "embed",
    "/v1/rerank": "rerank",
}
_MODELS: Final = "/v1/models"
_TOKENIZE: Final = "/v1/tokenize"
_WITHOUT_OUTPUT: Final = frozenset({"embed", "rerank", "inspect"})


def action_of(method: str, path: str) -> str:
    """The action that policy decides on. path: without its query. `inspect` changes nothing and runs no model: it reads what is
    served, and counts tokens. (A DELETE of a model is no `inspect`.) What is none of these is `http`.
    """
    if method == "GET" and (path == _MODELS or path.startswith(_MODELS + "/")):
        return "inspect"
    if method == "POST" and path == _TOKENIZE:
        return "inspect"
    return _RUNS.get(path, "http")


@dataclass(frozen=True, slots=True)
class Plain:
    """An application's request before sealing. `path` carries the query; header names are in lower case."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = field(repr=False)
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that may be sealed, and what of it must stand outside for policy and budget."""

    plain: Plain
    action: str
    model: str
    max_tokens: int


def is_repeatable(plain: Plain) -> bool:
    """Whether running the request twice harms nobody but the bill: a model's answer, or a look at something."""
    return plain.method in ("GET", "HEAD") or action_of(plain.method, plain.path.partition("?")[0]) != "http"


def prepare(plain: Plain, models: Sequence[str], *, keep_identifying_fields: bool) -> Prepared:
    """models: what the pool serves; the first stands in where the request names none, in its body or in a header `lacre-model`.
    The ceiling of an action `http` is that of a header `lacre-max-tokens`.

    Raises MessageTooLarge or UsageError. A body that is not JSON passes as it is: the model's server will refuse it.
    """
    if len(plain.content) > MAX_CONTENT:
        raise MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
    action = action_of(plain.method, plain.path.partition("?")[0])
    body = object_in(plain.content) if action != "http" else None
    allowed = replace(plain, headers=tuple((name, value) for name, value in plain.headers if name in ALLOWED_HEADERS))
    headers = dict(plain.headers)
    default_model = headers.get(_MODEL, models[0] if models else "")
    if action == "http":
        return Prepared(allowed, action, _named(default_model), _asked(headers.get(_MAX_TOKENS)))
    if body is None:
        ceiling = NO_OUTPUT if action == "inspect" else DEFAULT_MAX_TOKENS
        return Prepared(allowed, action, _named(default_model), ceiling)
    dropped = () if keep_identifying_fields else IDENTIFYING_FIELDS
    sealed_body = {name: value for name, value in body.items() if name not in dropped}
    if sealed_body.get("model") is None:
        sealed_body["model"] = default_model
    elif not isinstance(sealed_body["model"], str):
        raise UsageError("model: a string is wanted, or nothing for the pool's first; `client.models()` lists those served")
    if sealed_body != body:
        allowed = replace(allowed, content=json.dumps(sealed_body, separators=(",", ":"), ensure_ascii=False).encode())
    ceiling = NO_OUTPUT if action in _WITHOUT_OUTPUT else _ceiling(sealed_body)
    return Prepared(allowed, action, _named(sealed_body["model"]), ceiling)


def _named(model: str) -> str:
    if not _MODEL_NAME.fullmatch(model):
        raise UsageError("a model's name has 1 to 128 visible ASCII characters: `client.models()` lists those served")
    return model


def _asked(ceiling: str | None) -> int:
    if ceiling is None:
        return DEFAULT_MAX_TOKENS
    if not _COUNT.fullmatch(ceiling) or int(ceiling) > MAX_TOKENS:
        raise UsageError(f"the header `lacre-max-tokens` is a number from 1 to {MAX_TOKENS}: the KiB that an answer may hold")
    return int(ceiling)


def _ceiling(body: dict[str, Any]) -> int:
    """Output tokens over all choices; of an answer that is gone on with, those that are left. Values that are no counts are the
    model's server to refuse, not ours to mend.
    """
    asked = (body.get(name) for name in ("max_completion_tokens", "max_tokens"))
    each = next((value for value in asked if _is_count(value)), DEFAULT_MAX_TOKENS)
    each = max(each - _begun(body), 1)
    choices = body.get("n")
    return min(each * (choices if _is_count(choices) else 1), MAX_TOKENS)


def _begun(body: dict[str, Any]) -> int:
    """How many tokens of the answer are there already."""
    member = body.get(MEMBER)
    tokens = member.get("tokens") if isinstance(member, dict) else None
    return len(tokens) if isinstance(tokens, list) else 0


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
