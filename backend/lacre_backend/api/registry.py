"""Shared state of the endpoints: engines by model name, cache scopes, and fairness of calls."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lacre.asgi import Call, Scope
from lacre_backend.api.compiling import Compiler
from lacre_backend.api.errors import RequestRefused, model_not_found
from lacre_backend.api.http import header
from lacre_backend.api.template.pieces import markers_of
from lacre_backend.api.template.prompt import ChatTemplate
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.thoughts import ThoughtFormat
from lacre_backend.engine.protocol import Engine, TaskKind
from lacre_backend.engine.turns import NOBODY, Fair

SALT_HEADER: Final = b"lacre-cache-salt"


class ServedModel:
    """An engine and its chat template, if its model has one. cut: the tokens that end its reasoning early.

    Raises `SettingsError` if the template is unusable.
    """

    def __init__(self, engine: Engine) -> None:
        model = engine.model
        self.engine = engine
        chats = model.chat_template is not None and TaskKind.GENERATE in model.kinds
        self.template = ChatTemplate(model, markers_of(engine)) if chats else None
        thoughts = None if self.template is None else self.template.thoughts
        engine.speak(self._spoken())
        self.cut = () if thoughts is None else tuple(engine.tokenize(thoughts.cut, special=True))

    def _spoken(self) -> list[int]:
        """The control tokens with which the model marks calls and reasoning."""
        template = self.template
        if template is None:
            return []
        texts = (*(template.calls or HERMES).literals, *_marks(template.thoughts))
        return [
            token.id for token in self.engine.model.control_tokens if token.text and any(token.text in text for text in texts)
        ]


def _marks(thoughts: ThoughtFormat | None) -> tuple[str, ...]:
    return () if thoughts is None else (thoughts.open, thoughts.close, thoughts.goes_on, thoughts.answer)


@dataclass(frozen=True, slots=True)
class Serving:
    """The state that all endpoints share.

    engines: by model name. scope_key: turns a client's salt into a cache scope, differently in each process. time_limit:
    seconds of work for one choice.
    """

    engines: Mapping[str, ServedModel]
    scope_key: bytes = field(repr=False)
    time_limit: float | None
    compiler: Compiler = field(default_factory=Compiler)

    def named(self, model: str, kind: TaskKind | None = None) -> ServedModel:
        """kind: what the model must support. Raises `RequestRefused`."""
        served = self.engines.get(model)
        if served is None:
            raise model_not_found(model)
        if kind is not None and kind not in served.engine.model.kinds:
            (does,) = served.engine.model.kinds
            raise RequestRefused(f"The model `{model}` {does.value}s and does not {kind.value}. Name another.", param="model")
        return served

    def cache_scope(self, scope: Scope) -> bytes | None:
        """None: the client sent no salt and shares nothing."""
        salt = header(scope, SALT_HEADER)
        return None if salt is None else hmac.digest(self.scope_key, salt, "sha256")


def whose_turn(call: Call | None) -> Fair:
    """The pseudonyms of the grant. Nothing that the client sends can change them."""
    return NOBODY if call is None or call.fair is None else call.fair
