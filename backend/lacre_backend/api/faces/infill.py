"""`POST /infill`, in the form of llama.cpp's server: the text between two others, for editors.

Rules:
- Members that only steer that server's caches, slots and times have no effect here. The engine has its own order of samplers.
- A member that would change the answer and that this server does not support is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from lacre.asgi import Usage
from lacre.wire.outer import MAX_TOKENS
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import spoken
from lacre_backend.api.faces.face import Ending, Face, ServerEvent
from lacre_backend.api.messages import MAX_NAME
from lacre_backend.api.parsed import Echoed, bare, json_object, validated
from lacre_backend.api.prompts import Prompt, infill_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import Generate, check_generate
from lacre_backend.api.responses import ResponseInfo
from lacre_backend.api.tools.parts import Part
from lacre_backend.engine.protocol import Token

MAX_FILES: Final = 64  # beside the one that is edited
_IGNORED: Final[Mapping[str, type]] = {
    "cache_prompt": bool,
    "id_slot": int,
    "samplers": list,
    "t_max_prompt_ms": int,
    "t_max_predict_ms": int,
    "timings_per_token": bool,
    "response_fields": list,
}
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "n_probs": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "return_tokens": (False,),
    "post_sampling_probs": (False,),
}
_FREE: Final = ("n_predict", "seed")  # -1 is that server's word for "no limit", and for "any seed"
_OTHERS: Final = ("max_tokens", "n", "resume", "stream_options")  # members of `Generate` that this API does not have
_STOPS: Final = {"stop": "eos", "length": "limit"}  # how that server names an end; `word` if a stop string was met


class _File(Echoed):
    """filename: as the model sees it."""

    text: str
    filename: Annotated[str, Field(max_length=MAX_NAME)] = "file"


class InfillRequest(Generate):
    """input_prefix, input_suffix: before and after the answer. prompt: its beginning. input_extra: other files."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[tuple[_File, ...], Field(max_length=MAX_FILES, strict=False)] = ()
    prompt: str = ""
    n_predict: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    def output_limit(self) -> tuple[str, int | None]:
        return "n_predict", self.n_predict

    def alternatives(self) -> int | None:
        return None


class Infill(Face[InfillRequest]):
    """`POST /infill`."""

    action = "complete"
    prompt_param = "input_prefix"
    prefix = "infill-"

    def parse(self, body: bytes) -> InfillRequest:
        raw = json_object(body)
        told = bare({name: value for name, value in raw.items() if name not in _FREE or value != -1}, _IGNORED, _INERT)
        for name in _OTHERS:
            if name in told:
                raise RequestRefused(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
        request = validated(InfillRequest, told)
        check_generate(request)
        return request

    async def prompt(self, served: ServedModel, request: InfillRequest) -> Prompt:
        files = [(each.filename, each.text) for each in request.input_extra]
        before, after, begun = request.input_prefix, request.input_suffix, request.prompt
        return Prompt(await infill_prompt(served, before, after, "input_prefix", files=files, begun_with=begun))

    def writer(self, request: InfillRequest, reply: ResponseInfo) -> InfillWriter:
        return InfillWriter(reply)


class InfillWriter:
    """One object for a whole answer; of a stream each object has a piece, and the last one the counts."""

    end_mark: ClassVar[bytes] = b""

    def __init__(self, reply: ResponseInfo) -> None:
        self._model = reply.model.name
        self._ending: Ending | None = None

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending) -> dict[str, Any]:
        self._ending = ending
        return {"index": index, "content": spoken(parts)}

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        return {**choices[0], **self._end(spent)}

    def first(self, index: int, spent: Usage) -> Iterator[ServerEvent]:
        yield from ()

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterator[ServerEvent]:
        yield ServerEvent({"index": index, "content": spoken([part]), "stop": False})

    def last(self, index: int, ending: Ending) -> Iterator[ServerEvent]:
        self._ending = ending
        yield from ()

    def end(self, spent: Usage) -> Iterator[ServerEvent]:
        yield ServerEvent({"index": 0, "content": "", **self._end(spent)})

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        return ServerEvent(refusal.body())

    def _end(self, spent: Usage) -> dict[str, Any]:
        ending = self._ending or Ending("stop")
        return {
            "stop": True,
            "model": self._model,
            "tokens_predicted": spent.completion_tokens,
            "tokens_evaluated": spent.prompt_tokens,
            "tokens_cached": spent.cached_tokens,
            "truncated": False,
            "stop_type": "word" if ending.stop is not None else _STOPS.get(ending.reason, "none"),
            "stopping_word": ending.stop or "",
        }
