"""An ASGI app for one route: a generation, asked for and answered in the words of one face.

The response starts with the engine's first event. So a refusal before that has its own status, and a worker that dies in the
prefill has sent nothing.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import partial
from typing import Generic

from lacre.asgi import EXTENSION, Call, Disconnected, Receive, Scope, Send, Usage
from lacre.exchange.resume_marks import ANSWER, DIGEST
from lacre_backend.api import ceilings
from lacre_backend.api.errors import RequestRefused, engine_failed, other_model
from lacre_backend.api.faces.face import Asked, Face
from lacre_backend.api.http import EventStream, read_body, send_json, until_disconnect
from lacre_backend.api.prompts import call_format, thought_format
from lacre_backend.api.registry import Serving, whose_turn
from lacre_backend.api.requests import MAX_BODY
from lacre_backend.api.responses import AnswerName, ResponseInfo
from lacre_backend.api.run import Closing, GenerationRuns, fresh_id
from lacre_backend.api.streaming import Answer, Progress
from lacre_backend.api.tools.thoughts import AnswerForm, Reader
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
        counts = [len(prompt.tokens) + len(begun) for prompt in prompts]
        ceilings.check_prompt(call, model, counts, face.prompt_param, begun=len(begun))
        fair = whose_turn(call)
        form = AnswerForm(call_format(served), thought_format(served), prompts[0].start)
        held = partial(self._serving.compiler.grammar, served.engine, request, form, fair)
        grammar = await held()
        may_cut = request.max_thought is not None and form.thinks
        scope_key = self._serving.cache_scope(scope)
        task = Task(
            id=fresh_id(),
            prompt=(),
            begun=begun,
            max_tokens=ceilings.max_tokens(call, request, model, max(counts)),
            sampling=request.sampling(grammar),
            stop=request.stop,
            logprobs=request.alternatives(),
            # The answer behind a cut reads the prompt again: from a cache of its own, if the caller shares none.
            cache_scope=secrets.token_bytes(32) if may_cut and scope_key is None else scope_key,
            fair=fair,
            time_limit=self._serving.time_limit,
        )
        usage = Usage() if call is None else call.usage
        named = None if request.resume is None else request.resume.answer
        name = AnswerName.new() if named is None else AnswerName.parse(named)
        reply = ResponseInfo(face.prefix + name.id, name.created, model, request.include_usage)
        each = [
            replace(task, id=f"{task.id}.{i}", prompt=tuple(prompt.tokens), images=prompt.images)
            for i, prompt in enumerate(prompts)
        ]
        generation = GenerationRuns(
            served.engine,
            each,
            request.n,
            usage,
            face.prompt_param,
            weigh=None if call is None else call.weigh,
            closing=Closing(served.cut, held) if may_cut else None,
        )
        try:
            generation.submit()
            writer = face.writer(request, reply)

            def reader(choice: int) -> Reader | None:
                return face.reader(request, form, f"{name.id}.{choice}")

            answer = Answer(generation, usage, writer, reader, max_thought=request.max_thought if may_cut else None)
            if request.stream:
                progress = Progress.of(request, scope, usage) if face.marked else None
                own = ((DIGEST, model.digest), (ANSWER, str(name)))
                headers = () if progress is None else tuple((key.encode(), value.encode()) for key, value in own)
                await answer.stream(EventStream(send, headers), progress, named=named is not None)
            else:
                await send_json(send, 200, await answer.whole())
        finally:
            generation.close()
