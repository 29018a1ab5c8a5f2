"""An ASGI app for one route: a generation, asked for and answered in the words of one face.

The response starts with the engine's first event. So a refusal before that has its own status, and a worker that dies in the
prefill has sent nothing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Generic

from lacre.asgi import EXTENSION, Call, Disconnected, Receive, Scope, Send, Usage
from lacre.exchange.resume_marks import DIGEST
from lacre_backend.api import ceilings
from lacre_backend.api.errors import RequestRefused, engine_failed, other_model
from lacre_backend.api.faces.face import Asked, Face
from lacre_backend.api.http import EventStream, read_body, send_json, until_disconnect
from lacre_backend.api.prompts import call_format
from lacre_backend.api.registry import Serving, whose_turn
from lacre_backend.api.requests import MAX_BODY
from lacre_backend.api.responses import ResponseInfo
from lacre_backend.api.run import GenerationRuns, fresh_id
from lacre_backend.api.streaming import Answer, Progress
from lacre_backend.engine.protocol import EngineError, Task, TaskKind


class Endpoint(Generic[Asked]):
    """One face over all engines."""

    def __init__(self, serving: Serving, face: Face[Asked]) -> None:
        self._serving = serving
        self._face = face

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = self._face.parse(await read_body(receive, MAX_BODY))
            await until_disconnect(receive, self._answer(request, scope, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, self._face.refused(refusal))
        except Disconnected:
            return

    async def _answer(self, request: Asked, scope: Scope, send: Send) -> None:
        face = self._face
        call: Call | None = scope.get("extensions", {}).get(EXTENSION)
        if call is not None:
            call.weigh(request.choices)
        ceilings.check_action(call, request, face.action)
        served = self._serving.named(request.model, TaskKind.GENERATE)
        model, begun = served.engine.model, request.begun
        if request.resume is not None and request.resume.digest != model.digest:
            raise other_model(request.model)
        try:
            prompts = await face.prompts(served, request)
        except EngineError:
            raise engine_failed() from None
        counts = [len(prompt) + len(begun) for prompt in prompts]
        ceilings.check_prompt(call, model, counts, face.prompt_param, begun=len(begun))
        fair = whose_turn(call)
        grammar = await self._serving.compiler.grammar(served.engine, request, call_format(served), fair)
        task = Task(
            id=fresh_id(),
            prompt=(),
            begun=begun,
            max_tokens=ceilings.max_tokens(call, request, model, max(counts)),
            sampling=request.sampling(grammar),
            stop=request.stop,
            logprobs=request.alternatives(),
            cache_scope=self._serving.cache_scope(scope),
            fair=fair,
            time_limit=self._serving.time_limit,
        )
        usage = Usage() if call is None else call.usage
        reply = ResponseInfo(face.prefix + task.id, int(time.time()), model, request.include_usage)
        each = [replace(task, id=f"{task.id}.{i}", prompt=tuple(prompt)) for i, prompt in enumerate(prompts)]
        generation = GenerationRuns(
            served.engine, each, request.n, usage, face.prompt_param, weigh=None if call is None else call.weigh
        )
        try:
            generation.submit()
            answer = Answer(generation, usage, face.writer(request, reply), face.reader(served, request))
            if request.stream:
                progress = Progress.of(request, scope, usage) if face.marked else None
                headers = () if progress is None else ((DIGEST.encode(), model.digest.encode()),)
                await answer.stream(EventStream(send, headers), progress)
            else:
                await send_json(send, 200, await answer.whole())
        finally:
            generation.close()
