"""Parses requests once: JSON in, frozen objects or `RequestRefused` out. No dict of the caller's goes further.

Rules:
- A field of OpenAI's API that this server does not support is refused by name, never ignored, unless its value has no effect.
- Unknown fields are refused too, as OpenAI does: a misspelt limit must not mean no limit.
- Each limit is named below. Errors name the field in OpenAI's notation (`messages[0].content`), never its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from lacre.wire.outer import MAX_PARTS, MAX_TOKENS
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.messages import MAX_NAME, Message, Messages, TextPart, check_known, check_turns, has_a_beginning
from lacre_backend.api.parsed import Echoed, Parsed, bare, json_object, missing, validated
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.template.wishes import Wishes
from lacre_backend.api.tools.request import MAX_TOOLS, Calling, Tool, calling
from lacre_backend.api.tools.thoughts import AnswerForm
from lacre_backend.engine.protocol import Grammar, Sampling

MAX_BODY: Final = 7 * 2**20  # bytes; no sealed request is larger
MAX_N: Final = 16  # choices; each is a sequence in the engine
MAX_PROMPTS: Final = 64  # of a text completion
MAX_CHOICES: Final = 64  # of all prompts together: they wait in the engine at the same time
MAX_STOP: Final = 16  # OpenAI has 4; other servers take more
MAX_STOP_LENGTH: Final = 256  # characters; held-back text is searched for it at each token
MAX_TOP_LOGPROBS: Final = 20  # OpenAI's
MAX_LOGPROBS: Final = 5  # OpenAI's, for text completions
MAX_LOGIT_BIAS: Final = 300  # OpenAI's
MAX_TOP_K: Final = 1000
MAX_INPUTS: Final = 2048  # OpenAI's, for embeddings
MAX_VARIABLES: Final = 32  # of a chat template; none reads more than ten

# Fields of OpenAI's API that have no effect here at these values (null always among them). Other values are refused.
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "moderation": (),
    "prompt_cache_options": (),
    "echo": (False,),
    "best_of": (1,),
}
# Fields about the caller and its bookkeeping. No answer depends on them, and they are not stored.
_IGNORED: Final[Mapping[str, type]] = {
    "user": str,
    "metadata": dict,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "cache_control": dict,  # Anthropic's and OpenRouter's: prefixes are cached anyway
}
OWN_IDS: Final = "own_token_ids"
# Ids of another model's vocabulary mean other words here, yet their vectors look normal.
_FOREIGN_IDS: Final = (
    "'input' holds token ids. Send text: ids of another model's vocabulary would give wrong vectors. In LangChain, "
    "set OpenAIEmbeddings(check_embedding_ctx_length=False). For ids that this model's /v1/tokenize gave, add "
    '"own_token_ids": true.'
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Echoed):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: the seal pads records, not this server
    continuous_usage_stats: Literal[False] = False  # vLLM's: usage in each event


class JsonSchema(Echoed):
    """The schema in `response_format`. name: has no effect here, and may be the name of a generic class, such as
    `Page[int]`.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Echoed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def rule(self, grammars: Grammars, *, alone: bool) -> str | None:
        """The name of the grammar rule for this format; None for any text. alone: whether no tool call may replace it.

        Raises `RequestRefused`.
        """
        if self.type == "json_object":
            return grammars.any_object()
        if self.type == "json_schema":
            if self.json_schema is None:
                raise missing("response_format.json_schema")
            strict = bool(self.json_schema.strict)
            return grammars.schema(self.json_schema.schema_, "response_format", strict=strict, alone=alone)
        return None


class Resume(Parsed):
    """Continues a broken answer (not in OpenAI's API). digest: the file of the model that made it. tokens: the answer so
    far. answer: its name, from the header `lacre-answer`; without it, the rest begins as a new answer does.
    """

    digest: Annotated[str, Field(max_length=MAX_NAME)]
    answer: Annotated[str, Field(pattern=r"^[0-9a-f]{24}\.[0-9]{1,12}$")] | None = None
    tokens: Annotated[tuple[int, ...], Field(min_length=1, strict=False)]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class Named(Parsed):
    """A request that names a model."""

    model: Annotated[str, Field(max_length=MAX_NAME)]


class Generate(Named):
    """Common fields of chat and text completions."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...],
        BeforeValidator(_as_list),
        Field(max_length=MAX_STOP, strict=False),
    ] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0, strict=False)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIAS, default_factory=dict),
    ]
    # Not OpenAI's, but supported by every server of open models
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    resume: Resume | None = None

    @property
    def begun(self) -> tuple[int, ...]:
        """The tokens of the answer so far. The request's limits apply to the whole answer."""
        return () if self.resume is None else self.resume.tokens

    @property
    def choices(self) -> int:
        """How many sequences it generates."""
        return self.n

    @property
    def resumable(self) -> bool:
        """Whether another worker could continue the answer after a break."""
        return self.stream and self.choices == 1

    @property
    def held(self) -> bool:
        """Whether a grammar constrains the answer."""
        return False

    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits each choice's output, and its value."""
        return "max_tokens", self.max_tokens

    def sampling(self, grammar: Grammar | None) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repeat_penalty=self.repeat_penalty,
            seed=self.seed,
            logit_bias=self.logit_bias,
            grammar=grammar,
        )

    @property
    def max_thought(self) -> int | None:
        """How many tokens each choice may reason; None for any number."""
        return None

    def grammar(self, form: AnswerForm, grammars: Grammars) -> str | None:  # noqa: ARG002 - only chats have grammars
        """The grammar of the answer, built in `grammars`. Raises `RequestRefused`."""
        return None

    def alternatives(self) -> int | None:
        """How many alternatives to return with each token's logprob; None for no logprobs."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage. A whole answer always has it."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(Generate):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, strict=False)] = ()
    tool_choice: Any = None  # `tools.calling` reads it
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    # Not OpenAI's: variables of the model's chat template, and the longest reasoning in tokens.
    chat_template_kwargs: Annotated[
        dict[Annotated[str, Field(max_length=MAX_NAME)], Any], Field(max_length=MAX_VARIABLES, default_factory=dict)
    ]
    max_reasoning_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    # Not OpenAI's: the last message is the beginning of the answer, which continues it. Resumes a broken stream.
    continue_final_message: bool = False

    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def held(self) -> bool:
        return (self.response_format is not None and self.response_format.type != "text") or self.calling() is not None

    def calling(self) -> Calling | None:
        """The functions that the model may call. Raises `RequestRefused`."""
        return calling(self.tools, self.tool_choice, many=self.parallel_tool_calls)

    @property
    def max_thought(self) -> int | None:
        return self.max_reasoning_tokens

    @property
    def wishes(self) -> Wishes:
        """For the chat template."""
        return Wishes(self.reasoning_effort, self.max_reasoning_tokens, self.chat_template_kwargs)

    def grammar(self, form: AnswerForm, grammars: Grammars) -> str | None:
        may_call, thinks = self.calling(), form.thinks
        alone = may_call is None and not thinks and not form.said("")
        speech = None if self.response_format is None else self.response_format.rule(grammars, alone=alone)
        place = form.place
        if may_call is not None:
            rules = form.calls.grammar(grammars, may_call, speech, place)
        elif speech is not None:
            rules = f"{place.rule}: {form.said(speech)}\n"
        else:
            return None
        return grammars.text(f"start: thought answer\n{form.thought_rules()}{rules}" if thinks else rules)


class CompletionRequest(Generate):
    """`POST /v1/completions`: prompts, as text or as the model's token ids. suffix: the text after the answer, for models that
    fill in a middle.
    """

    prompt: Annotated[list[str | list[int]], Field(min_length=1, max_length=MAX_PROMPTS)]
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def choices(self) -> int:
        return self.n * len(self.prompt)

    def alternatives(self) -> int | None:
        return self.logprobs


class ExplainRequest(Named):
    """`POST /v1/explain` (not in OpenAI's API): which parts of the messages an answer rests on.

    parts: the places of the parts, as (message, content part), by their ids. answer: None: the model answers first, greedily.
    lens: whether to show what the model would say after each layer.
    """

    messages: Messages
    answer: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    lens: bool = False
    parts: dict[str, tuple[int, int]]

    def without(self, part: str) -> list[Message]:
        """The messages without this part. A message that has nothing else keeps an empty text."""
        i, j = self.parts[part]
        content = self.messages[i].content or []
        left = [*content[:j], *content[j + 1 :]] or [TextPart(type="text", text="")]
        return [*self.messages[:i], self.messages[i].model_copy(update={"content": left}), *self.messages[i + 1 :]]


class EmbeddingRequest(Named):
    """`POST /v1/embeddings`: inputs, each of which becomes a vector."""

    # Not OpenAI's: whether token ids in `input` are this model's, from `/v1/tokenize`.
    own_token_ids: bool = False
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class EmbedTexts(EmbeddingRequest):
    input: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]


class _OneInput(Parsed):
    input: list[int]


class EmbedTokens(EmbeddingRequest):
    input: Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]


class TokenizeRequest(Named):
    """`POST /v1/tokenize`: a text, or messages in the form of the model's chat template."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, strict=False)] = ()


def parse_tokenize(body: bytes) -> TokenizeRequest:
    raw = _object(body)
    check_known(raw.get("messages"))
    request = validated(TokenizeRequest, raw)
    if (request.prompt is None) == (request.messages is None):
        raise RequestRefused("Send either 'prompt' or 'messages'.", code="invalid_parameter_combination", param="prompt")
    check_turns(request.messages or ())
    return request


def parse_explain(body: bytes) -> ExplainRequest:
    raw = _object(body)
    if "parts" in raw:  # ours, and not the caller's to set
        raise RequestRefused("Unknown parameter: 'parts'.", code="unknown_parameter", param="parts")
    check_known(raw.get("messages"))
    request = validated(ExplainRequest, {**raw, "parts": _parts(raw.get("messages"))})
    check_turns(request.messages)
    return request


def _parts(messages: Any) -> dict[str, tuple[int, int]]:
    """The places of the content parts that have an `id`. messages: not checked yet. Raises `RequestRefused`."""
    places: dict[str, tuple[int, int]] = {}
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            name = part.get("id") if isinstance(part, dict) else None
            if name is None:
                continue
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name in places:
                raise RequestRefused(
                    f"A part's id is a text of 1 to {MAX_NAME} characters, which no other part has.",
                    code="invalid_value",
                    param=f"messages[{i}].content[{j}].id",
                )
            places[name] = i, j
    if len(places) > MAX_PARTS:
        raise RequestRefused(
            f"The messages have {len(places)} parts with an id. At most {MAX_PARTS} can be explained.",
            code="array_above_max_length",
            param="messages",
        )
    return places


def parse_chat(body: bytes) -> ChatCompletionRequest:
    raw = _object(body)
    if raw.get("suffix") == "":  # of a text completion; there it has no effect either
        del raw["suffix"]
    check_known(raw.get("messages"))
    request = validated(ChatCompletionRequest, raw)
    check_turns(request.messages)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestRefused(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            code="invalid_parameter_combination",
            param="max_tokens",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestRefused("'top_logprobs' needs 'logprobs' to be true.", code="invalid_value", param="top_logprobs")
    check_beginning(request)
    check_generate(request)
    return request


def check_beginning(request: ChatCompletionRequest) -> None:
    """Raises `RequestRefused`."""
    if request.continue_final_message and not has_a_beginning(request.messages):
        raise RequestRefused(
            "'continue_final_message' needs a text message of the assistant at the end, after at least one other message.",
            code="invalid_value",
            param="continue_final_message",
        )


def check_named(request: Generate) -> None:
    """For APIs whose events name their answer. Raises `RequestRefused`."""
    if request.resume is not None and request.resume.answer is None:
        raise missing("resume.answer")


def parse_completion(body: bytes) -> CompletionRequest:
    raw = _object(body)
    if "prompt" in raw:
        raw["prompt"] = _prompts(raw["prompt"])
    request = validated(CompletionRequest, raw)
    if request.choices > MAX_CHOICES:
        raise RequestRefused(
            f"The request asks for {request.choices} choices over all prompts. At most {MAX_CHOICES} are possible.",
            code="array_above_max_length",
            param="prompt",
        )
    if request.suffix and not all(isinstance(each, str) for each in request.prompt):
        raise RequestRefused("'suffix' needs a prompt of text.", code="invalid_parameter_combination", param="suffix")
    check_generate(request)
    return request


def _prompts(given: Any) -> Any:
    """A list of prompts, each a text or a list of token ids. Raises `RequestRefused`."""
    if isinstance(given, str) or (isinstance(given, list) and given and not isinstance(given[0], str | list)):
        given = [given]
    if not isinstance(given, list):
        raise _wrong_prompt("prompt")
    for i, each in enumerate(given):
        ids = isinstance(each, list) and each and all(isinstance(token, int) and not isinstance(token, bool) for token in each)
        if not isinstance(each, str) and not ids:
            raise _wrong_prompt("prompt" if len(given) == 1 else f"prompt[{i}]")
    return given


def _wrong_prompt(param: str) -> RequestRefused:
    said = f"Invalid type for '{param}': expected an array of texts or of lists of token ids, or one of these."
    return RequestRefused(said, code="invalid_type", param=param)


def parse_embedding(body: bytes) -> EmbedTexts | EmbedTokens:
    raw = _object(body)
    given = raw.get("input")
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(given, str):
        return validated(EmbedTexts, {**raw, "input": [given]})
    if isinstance(first, bool) or not isinstance(first, int | list):
        return validated(EmbedTexts, raw)
    if isinstance(first, int):
        validated(_OneInput, {"input": given})  # its errors name the field as the caller wrote it
    request = validated(EmbedTokens, {**raw, "input": [given] if isinstance(first, int) else given})
    check_token_ids(given, request.own_token_ids)
    return request


def check_token_ids(given: Any, own: Any) -> None:
    """given: the `input` of embeddings. own: whether the caller says that its ids are this model's. Raises `RequestRefused`."""
    ids = isinstance(given, list) and any(isinstance(each, int | list) for each in given)
    if own not in (None, True, False):
        raise RequestRefused(f"Invalid type for '{OWN_IDS}': expected a boolean.", code="invalid_type", param=OWN_IDS)
    if ids and own is not True:
        raise RequestRefused(_FOREIGN_IDS, code="token_ids_refused", param="input")


def check_generate(request: Generate) -> None:
    """Raises `RequestRefused`."""
    if request.resume is not None and request.choices > 1:
        raise RequestRefused("'resume' is for one choice.", code="invalid_parameter_combination", param="resume")


def _object(body: bytes) -> dict[str, Any]:
    """The body's JSON object without fields that have no effect."""
    return bare(json_object(body), _IGNORED, _INERT)
