"""How many tokens a prompt has, before the request is made: nothing runs but the template and the tokenizer."""

from __future__ import annotations

from typing import Generic

from lacre.asgi import EXTENSION, Disconnected, Receive, Scope, Send
from lacre_backend.api import ceilings
from lacre_backend.api.errors import RequestRefused, engine_failed
from lacre_backend.api.faces.face import Asked, Face
from lacre_backend.api.http import read_body, send_json
from lacre_backend.api.prompts import chat_start, plain_tokens
from lacre_backend.api.registry import Serving
from lacre_backend.api.requests import MAX_BODY, parse_tokenize
from lacre_backend.engine.protocol import EngineError, TaskKind


class Tokenize:
    """An ASGI app for `/v1/tokenize`, in vLLM's format: the cost of a request before it is made."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_tokenize(await read_body(receive, MAX_BODY))
            ceilings.check_action(scope.get("extensions", {}).get(EXTENSION), request, "inspect")
            served = self._serving.named(request.model)
            if request.messages is not None:
                tokens = (await chat_start(served, request.messages, request.tools, goes_on=False)).tokens
            else:
                tokens = await plain_tokens(served, request.prompt or "")
            answer = {"count": len(tokens), "max_model_len": served.engine.model.n_ctx, "tokens": tokens}
            await send_json(send, 200, answer)
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except EngineError:
            await send_json(send, engine_failed().status, engine_failed().body())
        except Disconnected:
            return


class CountTokens(Generic[Asked]):
    """An ASGI app that counts the prompt of a request in the words of one face."""

    def __init__(self, serving: Serving, face: Face[Asked]) -> None:
        self._serving = serving
        self._face = face

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        face = self._face
        try:
            request = face.parse(await read_body(receive, MAX_BODY))
            ceilings.check_action(scope.get("extensions", {}).get(EXTENSION), request, "inspect")
            served = self._serving.named(request.model, TaskKind.GENERATE)
            prompt = await face.prompt(served, request)
            await send_json(send, 200, face.counted(len(prompt.tokens)))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, face.refused(refusal))
        except EngineError:
            await send_json(send, engine_failed().status, face.refused(engine_failed()))
        except Disconnected:
            return
