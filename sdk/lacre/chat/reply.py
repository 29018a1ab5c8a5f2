"""OpenAI's chat format, as far as the SDK reads it: a whole answer, or an error in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, overload

import httpx2

from lacre.chat.choices import Choice, TokenLogprob, ToolCall
from lacre.chat.structured import Schema, T
from lacre.errors import ApiError, InvalidMessage, InvalidReceipt, LacreError, UsageError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts, documented
from lacre.evidence.receipts import Receipt
from lacre.evidence.recount import Recount, Tokenizer, Written
from lacre.evidence.verification import Verification
from lacre.runtime import arguments
from lacre.runtime.json_objects import parse_object
from lacre.transport.sealed import FACTS, REFUSAL

CHAT_PATH: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of the prompt (`cached`: those of them reused from the prefix cache) and of the answer."""

    prompt: int
    completion: int
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, made only after the seal's final chunk has opened. Its `repr` shows nothing of its content.

    choices: all of them. `text`, `tool_calls`, `finish_reason`, `refusal`, `reasoning`, `logprobs`, `message`: the first's.
    attempts: how often the request was sealed and sent. receipt: the pool's signed statement of the usage, verified, and equal
    to `usage`. audit: the gateway's verified proof that it recorded this request; worth keeping. verification: every check of
    the answer, with its keys. raw: the whole JSON object. cost: in the currency's unit, of all requests for this answer; None
    if the client was made without the model's price.
    """

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: TokenUsage
    attempts: int
    receipt: Receipt = field(repr=False)
    audit: AuditProof = field(repr=False)
    verification: Verification = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    cost: Decimal | None = None

    @property
    def text(self) -> str:
        """The model's text; empty if it only calls functions."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's `stop`, `length`, `tool_calls` and so on; None if the worker did not say."""
        return self.choices[0].finish_reason

    @property
    def refusal(self) -> str | None:
        return self.choices[0].refusal

    @property
    def reasoning(self) -> str | None:
        return self.choices[0].reasoning

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """For each token, if `logprobs=True` asked for them."""
        return self.choices[0].logprobs

    @property
    def message(self) -> Mapping[str, Any]:
        """To append to `messages` for the next turn."""
        return self.choices[0].message

    @overload
    def parsed(self) -> Any: ...

    @overload
    def parsed(self, kind: type[T]) -> T: ...

    def parsed(self, kind: Any = None) -> Any:
        """The text as an instance of `kind`, such as a model of pydantic. None: of the request's `schema`, if that is a type;
        plain JSON values otherwise.

        Raises InvalidMessage if the text does not fit: it was cut short, or the request had no `schema`.
        """
        return self.choices[0].parsed(kind)

    @classmethod
    def parse(cls, response: httpx2.Response, schema: Schema | None = None) -> Reply:
        """schema: the request's, if it had one.

        Raises what `check` raises, InvalidMessage if the answer is not a chat completion, and InvalidReceipt if its usage and
        its receipt differ.
        """
        facts = facts_of(response)
        with documented(facts):
            return cls.of(checked_json(response), facts, schema)

    @classmethod
    def of(cls, body: Mapping[str, Any], facts: Facts, schema: Schema | None = None) -> Reply:
        """body: a chat completion. schema: the request's. Raises InvalidMessage and InvalidReceipt."""
        arguments.instance(facts, Facts, "facts")
        if facts.receipt is None or facts.audit is None:
            raise InvalidReceipt("the answer has no receipt, or no proof that it was recorded")
        try:
            _written(body)
            choices = tuple(Choice.parse(choice, place, schema) for place, choice in enumerate(body["choices"]))
            if not choices:
                raise IndexError
            return cls(
                id=str(body["id"]),
                model=str(body["model"]),
                choices=choices,
                usage=checked_usage(body["usage"], claimed(facts, facts.receipt)),
                attempts=facts.attempts,
                receipt=facts.receipt,
                audit=facts.audit,
                verification=facts.verification,
                raw=body,
                cost=facts.cost,
            )
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as exc:
            raise InvalidMessage("the worker's answer is not a chat completion") from exc

    def recount(self, tokenizer: Tokenizer | None = None) -> Recount:
        """Counts the answer's tokens again, as far as a client can. tokenizer: returns the number of tokens of a text."""
        return _written(self.raw).recount(self.receipt.completion_tokens, tokenizer)


def _written(body: Mapping[str, Any]) -> Written:
    written = Written()
    for choice in body["choices"]:
        written.add(choice, choice["message"])
    return written


def claimed(facts: Facts, receipt: Receipt) -> TokenUsage:
    """Usage over all requests of an answer: its receipt's, plus the records of the requests that broke off."""
    return TokenUsage(
        prompt=receipt.prompt_tokens + sum(part.prompt for part in facts.parts),
        completion=receipt.completion_tokens + sum(part.completion for part in facts.parts),
        cached=receipt.cached_tokens + sum(part.cached for part in facts.parts),
    )


def checked_usage(told: Mapping[str, Any] | None, claimed: TokenUsage) -> TokenUsage:
    """The usage of an answer, after a check that the answer and its receipt agree. Raises InvalidReceipt.

    told: OpenAI's `usage`; None and missing members claim nothing.
    """
    if told is None:
        return claimed
    try:
        cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens")
        usage = TokenUsage(told["prompt_tokens"], told["completion_tokens"], claimed.cached if cached is None else cached)
    except (KeyError, TypeError, AttributeError) as exc:
        raise InvalidMessage("the answer's usage does not have OpenAI's form") from exc
    if usage != claimed:
        raise InvalidReceipt("the answer's receipt and its usage have different counts: tell the pool's operator")
    return claimed


def facts_of(response: httpx2.Response) -> Facts:
    """What the sealed transport says of an answer. Raises UsageError for any other answer."""
    arguments.instance(response, httpx2.Response, "response")
    facts = response.extensions.get(FACTS)
    if not isinstance(facts, Facts):
        raise UsageError("response must be an answer of a sealed client")
    return facts


def check(response: httpx2.Response) -> None:
    """Raises the gateway's RefusedError, or for an error from inside the seal an ApiError. The body must have been read."""
    refusal = response.extensions.get(REFUSAL)
    if isinstance(refusal, LacreError):
        raise refusal
    if response.status_code >= 400:
        raise api_error(response.status_code, response.content)


def checked_json(response: httpx2.Response) -> dict[str, Any]:
    check(response)
    return json_object(response.content)


def api_error(status: int, content: bytes) -> ApiError:
    """The error in OpenAI's shape, or with a problem document's title."""
    try:
        body = json_object(content)
    except InvalidMessage:
        body = {}
    error = body.get("error")
    if not isinstance(error, dict):
        error = {"message": body.get("title"), "code": body.get("type")}
    code = error.get("code")
    return ApiError(
        str(error.get("message") or f"the worker answered with status {status}"),
        status=status,
        code=code if isinstance(code, str) else None,
        type=str(error.get("type") or "api_error"),
    )


def json_object(content: bytes) -> dict[str, Any]:
    return parse_object(content, "the worker's answer")
