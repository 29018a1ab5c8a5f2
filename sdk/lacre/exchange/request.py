"""The content of a sealed request: the application's request without anything that says who asks.

Headers are taken by allow-list. `Authorization`, cookies, `User-Agent`, `X-Stainless-*` and trace context never go in. Of a
JSON body, for any path, the members in `IDENTIFYING_FIELDS` are dropped unless the caller insists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Final, NamedTuple, TypeGuard

from lacre.errors import MessageTooLarge, UsageError
from lacre.exchange.affinity import beginning_of
from lacre.exchange.resume_marks import ASK, MEMBER
from lacre.runtime.json_objects import object_in
from lacre.trust.manifest import ModelEntry, ModelKind
from lacre.wire import outer
from lacre.wire.header import MAX_SEALED_REQUEST

# If the caller names no ceiling: KiB of the action `http`, and tokens of an explanation, which may run them 17 times.
OTHER_CEILING: Final = 512
NO_OUTPUT: Final = 1  # the least value of `Lacre-Max-Tokens`, for actions whose answer holds no tokens
# The last one says how many bytes of a body are JSON, before tensors in binary form (the Open Inference Protocol). It describes
# the content as its type does.
ALLOWED_HEADERS: Final = frozenset({"content-type", "accept", ASK, "inference-header-content-length"})
# Fields of OpenAI's and Anthropic's APIs that say who asks. `prompt_cache_key` replaces `user` and is a lasting pseudonym; here
# the salt does its work, and the salt changes every hour.
IDENTIFYING_FIELDS: Final = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "client_metadata", "user_profile_id", "workspace_id",
)  # fmt: skip
# Sealing adds the key encapsulation, a tag for each chunk, headers and padding: less than this together.
MAX_CONTENT: Final = MAX_SEALED_REQUEST - 2**17

_CHAT: Final = "chat"
EXPLAIN: Final = "explain"
LENS: Final = "lens"  # an explanation that also shows the layers, which needs a scope of its own
# The actions that run a model, each with its path. Of `/v1/explain`, the body may make it `LENS`.
_RUNS: Final = {
    "/v1/chat/completions": _CHAT,
    "/v1/responses": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/completions": "complete",
    "/infill": "complete",
    "/v1/embeddings": "embed",
    "/v1/rerank": "rerank",
    "/v1/explain": EXPLAIN,
}
_MODELS: Final = "/v1/models"
_COUNTS: Final = frozenset({"/v1/tokenize", "/v1/responses/input_tokens", "/v1/messages/count_tokens"})
_WITHOUT_OUTPUT: Final = frozenset({"embed", "rerank", "inspect"})
_GENERATES: Final = frozenset({"chat", "complete"})  # actions whose default ceiling is the model's own
_N_PREDICT: Final = "n_predict"  # of llama.cpp's server, where -1 is no limit
_LIMITS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens", _N_PREDICT)
# The kind of model that an action needs. Others have the manifest's default model.
_KINDS: Final = {
    "chat": ModelKind.GENERATE,
    "complete": ModelKind.GENERATE,
    "embed": ModelKind.EMBED,
    "rerank": ModelKind.RERANK,
}


def action_of(method: str, path: str) -> str:
    """The action that policy decides on. path: without its query. `inspect` changes nothing and runs no model: it lists models
    and counts tokens. (A DELETE of a model is no `inspect`.) Every other path is `http`.
    """
    if method == "GET" and (path == _MODELS or path.startswith(_MODELS + "/")):
        return "inspect"
    if method == "POST" and path in _COUNTS:
        return "inspect"
    return _RUNS.get(path, "http")


def may_be(action: str, method: str, path: str) -> bool:
    """Whether a request to this path may be this action. Only its body says whether an explanation has a lens."""
    found = action_of(method, path)
    return action == found or (found == EXPLAIN and action == LENS)


@dataclass(frozen=True, slots=True)
class Overrides:
    """Options of some calls, in place of their client's. None, or `...` for `retries`: the client's own.

    model: the model of a request that names none. cache_scope: names one of the program's users, for a prefix cache apart.
    """

    pool: str | None = None
    model: str | None = None
    cache_scope: str | None = field(default=None, repr=False)
    retries: int | EllipsisType | None = ...

    def over(self, older: Overrides) -> Overrides:
        """These, and the older ones where these say nothing."""
        return Overrides(
            pool=self.pool or older.pool,
            model=self.model or older.model,
            cache_scope=self.cache_scope or older.cache_scope,
            retries=older.retries if self.retries is ... else self.retries,
        )


NO_OVERRIDES: Final = Overrides()


@dataclass(frozen=True, slots=True)
class Plain:
    """An application's request before sealing. `path` includes the query; header names are in lower case.

    stays: the pool and the model of the answer that the request continues, if it does.
    """

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = field(repr=False)
    content: bytes = field(repr=False)
    overrides: Overrides = NO_OVERRIDES
    stays: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready to be sealed, and the outer values that policy and budget need.

    is_default: whether the caller named no ceiling, so that the gateway may lower it. Nothing inside the seal names one then.
    beginning: of the conversation, if it is a chat (see `lacre.exchange.affinity`).
    """

    plain: Plain
    action: str
    model: str
    max_tokens: int
    is_default: bool = False
    beginning: bytes | None = field(default=None, repr=False)


def is_repeatable(plain: Plain) -> bool:
    """Whether running the request twice harms nothing but the bill: it runs a model or only reads something."""
    return plain.method in ("GET", "HEAD") or action_of(plain.method, plain.path.partition("?")[0]) != "http"


class AskedModel(NamedTuple):
    """What a request says of itself before it is known where it goes.

    model: as the caller names it, or the default for a request that runs one; None if the request needs none. user: for whom
    the caller asks, in words of its own; None if it does not say.
    """

    model: str | None
    user: str | None


def asked_model(plain: Plain, models: Mapping[str, ModelEntry]) -> AskedModel:
    """models: those of the caller's pool."""
    action, headers = action_of(plain.method, plain.path.partition("?")[0]), dict(plain.headers)
    body = {} if action == "http" else object_in(plain.content) or {}
    named = body.get("model")
    if named is None:
        named = headers.get(outer.MODEL) or plain.overrides.model
    if named is None and action in _RUNS.values():
        named = _default_model(models, action)
    return AskedModel(named if isinstance(named, str) else None, plain.overrides.cache_scope or _user(body))


def _user(body: Mapping[str, Any]) -> str | None:
    """The end user, or else the conversation, as applications name them to the APIs of OpenAI and Anthropic."""
    metadata = body.get("metadata")
    by_messages = metadata.get("user_id") if isinstance(metadata, dict) else None
    said = (body.get("safety_identifier"), body.get("user"), by_messages, body.get("prompt_cache_key"))
    return next((each for each in said if isinstance(each, str) and each), None)


def prepare(
    plain: Plain, models: Mapping[str, ModelEntry], *, keep_identifying_fields: bool, routed: str | None = None
) -> Prepared:
    """models: those of the pool; see `_default_model` for a request whose body, `lacre-model` header and client's options name
    none. routed: takes the place of the name that the caller gave. The header `lacre-max-tokens` sets the ceiling of an action
    `http`.

    Raises MessageTooLarge or UsageError. A body that is not JSON passes unchanged: the model's server refuses it.
    """
    if len(plain.content) > MAX_CONTENT:
        raise MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
    action = action_of(plain.method, plain.path.partition("?")[0])
    body = object_in(plain.content)
    allowed = replace(plain, headers=tuple((name, value) for name, value in plain.headers if name in ALLOWED_HEADERS))
    headers = dict(plain.headers)
    # Headers for a request whose body cannot say it: the model, and how much the answer may hold.
    default_model = routed or headers.get(outer.MODEL) or plain.overrides.model or _default_model(models, action)
    if body is None:
        ceiling = NO_OUTPUT if action == "inspect" else OTHER_CEILING
        ceiling = _asked(headers.get(outer.CEILING)) if action == "http" else ceiling
        return Prepared(allowed, action, _named(default_model), ceiling)
    dropped = () if keep_identifying_fields else IDENTIFYING_FIELDS
    sealed_body = {name: value for name, value in body.items() if name not in dropped}
    if action == "http":
        return Prepared(
            _with_body(allowed, body, sealed_body), action, _named(default_model), _asked(headers.get(outer.CEILING))
        )
    if routed is not None or sealed_body.get("model") is None:
        sealed_body["model"] = default_model
    elif not isinstance(sealed_body["model"], str):
        raise UsageError(
            "`model` is not a string: pass a name that `client.models()` lists, or omit it for the pool's default model"
        )
    model = _named(sealed_body["model"])
    given = action == EXPLAIN and isinstance(sealed_body.get("answer"), str)  # nothing is left to generate
    if action == EXPLAIN and sealed_body.get(LENS) is True:
        action = LENS
    sealed = _with_body(allowed, body, sealed_body)
    if given or action in _WITHOUT_OUTPUT:
        return Prepared(sealed, action, model, NO_OUTPUT)
    is_default = action in _GENERATES and not any(_is_limit(name, sealed_body.get(name)) for name in _LIMITS)
    each = models.get(model, ModelEntry()).output if is_default else OTHER_CEILING
    beginning = beginning_of(sealed_body) if action == _CHAT else None
    return Prepared(sealed, action, model, _ceiling(sealed_body, each), is_default, beginning)


def _default_model(models: Mapping[str, ModelEntry], action: str) -> str:
    """The pool's default model, unless the manifest says that it cannot do this and that another one can."""
    first = next(iter(models), "")
    wanted, kind = _KINDS.get(action), models.get(first, ModelEntry()).kind
    if wanted is None or kind is wanted or (kind is None and wanted is ModelKind.GENERATE):
        return first
    return next((name for name, entry in models.items() if entry.kind is wanted), first)


def _with_body(plain: Plain, given: dict[str, Any], sealed: dict[str, Any]) -> Plain:
    """A body of which nothing changes keeps its bytes."""
    if sealed == given:
        return plain
    return replace(plain, content=json.dumps(sealed, separators=(",", ":"), ensure_ascii=False).encode())


def _named(model: str) -> str:
    if not outer.is_name(model):
        raise UsageError("a model's name has 1 to 128 visible ASCII characters: `client.models()` lists the names")
    return model


def _asked(ceiling: str | None) -> int:
    if ceiling is None:
        return OTHER_CEILING
    if (asked := outer.ceiling_in(ceiling)) is None:
        wanted = f"must be a number from 1 to {outer.MAX_TOKENS}: the KiB that an answer may hold"
        raise UsageError(f"the header `{outer.CEILING}` {wanted}")
    return asked


def _ceiling(body: dict[str, Any], default: int) -> int:
    """Output tokens over all choices; of a resumed answer, those that remain. default: of each choice. A value that is not a
    count passes unchanged: the model's server refuses it.
    """
    asked = (body.get(name) for name in _LIMITS)
    each = next((value for value in asked if _is_count(value)), default)
    each = max(each - _begun(body), 1)
    choices = body.get("n")
    return min(each * (choices if _is_count(choices) else 1) * prompts_in(body.get("prompt")), outer.MAX_TOKENS)


def prompts_in(prompt: object) -> int:
    """How many prompts the `prompt` of a completion has, each with choices of its own. A list of token ids is one."""
    several = isinstance(prompt, list) and any(isinstance(each, str | list) for each in prompt)
    return len(prompt) if several and isinstance(prompt, list) else 1


def _is_limit(name: str, value: object) -> bool:
    return value is not None and (name != _N_PREDICT or value != -1)


def _begun(body: dict[str, Any]) -> int:
    """How many tokens of the answer exist already."""
    member = body.get(MEMBER)
    tokens = member.get("tokens") if isinstance(member, dict) else None
    return len(tokens) if isinstance(tokens, list) else 0


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
