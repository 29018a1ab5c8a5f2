"""OpenAI's chat format, as far as the SDK itself reads it: a whole answer, and the errors in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from lacre.chat.choices import Choice, TokenLogprob, ToolCall
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
    """Tokens of the prompt (`cached`: of them, those reused from the prefix cache) and of the answer."""

    prompt: int
    completion: int
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: it is made only after the seal's final chunk has opened. Its `repr` says nothing of what was answered.

    choices: all of them. `text`, `tool_calls`, `finish_reason`, `refusal`, `reasoning`, `logprobs`, `message`: the first's.
    attempts: how often the request was sealed and sent.
    receipt: the pool's signed word on what was used, verified, and equal to `usage`.
    audit: the gateway's proof, verified, that it recorded this request; worth keeping.
    verification: what was checked, and with what. raw: the whole JSON object.
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

    @property
    def text(self) -> str:
        """What the model said; empty where it only calls functions."""
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
        """Of each token, where `logprobs=True` asked for them."""
        return self.choices[0].logprobs

    @property
    def message(self) -> Mapping[str, Any]:
        """To be appended to `messages` for the next turn."""
        return self.choices[0].message

    @classmethod
    def parse(cls, response: httpx2.Response) -> Reply:
        """Raises what `check` raises, InvalidMessage for an answer that is no chat completion, and InvalidReceipt where its
        usage is not that of its receipt.
        """
        arguments.instance(response, httpx2.Response, "response")
        facts = response.extensions.get(FACTS)
        if not isinstance(facts, Facts):
            raise UsageError("response: an answer of a sealed client is expected, and this is another's")
        with documented(facts):
            return cls.of(checked_json(response), facts)

    @classmethod
    def of(cls, body: Mapping[str, Any], facts: Facts) -> Reply:
        """body: a chat completion. Raises InvalidMessage and InvalidReceipt."""
        arguments.instance(facts, Facts, "facts")
        if facts.receipt is None or facts.audit is None:
            raise InvalidReceipt("the answer came without a receipt or a proof that it was recorded")
        try:
            _written(body)
            choices = tuple(Choice.parse(choice, place) for place, choice in enumerate(body["choices"]))
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
            )
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as exc:
            raise InvalidMessage("the worker's answer is not a chat completion") from exc

    def recount(self, tokenizer: Tokenizer | None = None) -> Recount:
        """The answer's tokens counted again, as far as that can be done here. tokenizer: how many tokens a text has."""
        return _written(self.raw).recount(self.receipt.completion_tokens, tokenizer)


def _written(body: Mapping[str, Any]) -> Written:
    written = Written()
    for choice in body["choices"]:
        written.add(choice, choice["message"])
    return written


def claimed(facts: Facts, receipt: Receipt) -> TokenUsage:
    """What an answer took, over all its requests: as its receipt says, and the records of those that broke off."""
    return TokenUsage(
        prompt=receipt.prompt_tokens + sum(part.prompt for part in facts.parts),
        completion=receipt.completion_tokens + sum(part.completion for part in facts.parts),
        cached=receipt.cached_tokens + sum(part.cached for part in facts.parts),
    )


def checked_usage(told: Mapping[str, Any] | None, claimed: TokenUsage) -> TokenUsage:
    """The usage of an answer, once what the answer itself tells is what its receipt claims. Raises InvalidReceipt.

    told: OpenAI's `usage`; None, and a member that is not there, tell nothing.
    """
    if told is None:
        return claimed
    try:
        cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens")
        usage = TokenUsage(told["prompt_tokens"], told["completion_tokens"], claimed.cached if cached is None else cached)
    except (KeyError, TypeError, AttributeError) as exc:
        raise InvalidMessage("the answer's usage has not the form of OpenAI's") from exc
    if usage != claimed:
        raise InvalidReceipt("the answer's receipt claims other tokens than its usage tells: tell the pool's operator")
    return claimed


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
    """The error in OpenAI's shape, or a problem document's title."""
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
