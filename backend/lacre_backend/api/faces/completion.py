"""Text completions: `text_completion`, whose chunks have the same form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lacre.asgi import Usage
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import DONE, spoken
from lacre_backend.api.faces.face import Ending, Face, ServerEvent
from lacre_backend.api.prompts import Prompt, given_tokens, infill_prompt, text_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import CompletionRequest, parse_completion
from lacre_backend.api.responses import LEAST_LOGPROB, ResponseInfo, usage
from lacre_backend.api.tools.parts import Part
from lacre_backend.engine.protocol import Token


class Completion(Face[CompletionRequest]):
    """`POST /v1/completions`."""

    action = "complete"
    prompt_param = "prompt"
    prefix = "cmpl-"
    marked = True

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(body)

    async def prompt(self, served: ServedModel, request: CompletionRequest) -> Prompt:
        return (await self.prompts(served, request))[0]

    async def prompts(self, served: ServedModel, request: CompletionRequest) -> list[Prompt]:
        if request.suffix:
            found = [await infill_prompt(served, str(given), request.suffix, "suffix") for given in request.prompt]
        else:
            found = [
                await text_prompt(served, given)
                if isinstance(given, str)
                else given_tokens(served, given, "prompt" if len(request.prompt) == 1 else f"prompt[{i}]")
                for i, given in enumerate(request.prompt)
            ]
        return [Prompt(tokens) for tokens in found]

    def writer(self, request: CompletionRequest, reply: ResponseInfo) -> CompletionWriter:
        return CompletionWriter(reply)


class CompletionWriter:
    """`text_completion`; its chunks have the same form."""

    end_mark: ClassVar[bytes] = DONE

    def __init__(self, reply: ResponseInfo) -> None:
        self._usage_asked = reply.usage_asked
        self._head = reply.head("text_completion") | ({"usage": None} if reply.usage_asked else {})
        self._offsets: dict[int, int] = {}  # choice -> characters of its tokens so far

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        known = [token for token in tokens if token.logprob is not None]
        if not known:
            return None
        texts = [token.raw.decode("utf-8", "replace") for token in known]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob or 0.0, LEAST_LOGPROB) for token in known],
            "top_logprobs": [
                {a.raw.decode("utf-8", "replace"): max(a.logprob, LEAST_LOGPROB) for a in token.top} for token in known
            ],
            "text_offset": offsets,
        }

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": spoken(parts),
            "logprobs": self.logprobs(index, tokens),
            "finish_reason": ending and ending.reason,
        }

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        return {**self._head, "choices": list(choices), "usage": usage(spent)}

    def first(self, index: int, spent: Usage) -> Iterator[ServerEvent]:
        """Text completions begin without a chunk of their own."""
        yield from ()

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterator[ServerEvent]:
        yield ServerEvent({**self._head, "choices": [self.choice(index, [part], tokens, None)]})

    def last(self, index: int, ending: Ending) -> Iterator[ServerEvent]:
        yield ServerEvent({**self._head, "choices": [self.choice(index, (), (), ending)]})

    def end(self, spent: Usage) -> Iterator[ServerEvent]:
        if self._usage_asked:
            yield ServerEvent({**self._head, "choices": [], "usage": usage(spent)})

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        return ServerEvent(refusal.body())
