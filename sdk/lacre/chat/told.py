"""`lacre.info`: receipts and checks behind an object of another package, such as a completion of `openai`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lacre.chat.reply import claimed
from lacre.errors import UsageError
from lacre.evidence.exchange_info import Facts
from lacre.evidence.recent import RECENT
from lacre.transport.sealed import FACTS

_COUNTS: Final = (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))  # names in OpenAI's two APIs


def info(answer: object) -> Facts:
    """The receipt, the audit proof and the checks of the exchange that an answer came from.

    answer: a whole answer of `openai`, one of its streams, a raw response, or a response of `httpx2` or `httpx`. An answer of
    `openai` keeps only the request's id; this process knows its newest 1,024 exchanges. Raises UsageError for any other object.
    """
    for holder in (answer, getattr(answer, "http_response", None), getattr(answer, "response", None)):
        extensions = getattr(holder, "extensions", None)
        facts = extensions.get(FACTS) if isinstance(extensions, Mapping) else None
        if isinstance(facts, Facts):
            return facts
    request_id = getattr(answer, "_request_id", None)
    facts = RECENT.find(request_id) if isinstance(request_id, str) else None
    if facts is None:
        raise UsageError(
            "this is no answer of a sealed client, or too many answers came after it: call lacre.info right after the answer"
        )
    if not _agrees(getattr(answer, "usage", None), facts):
        raise UsageError("the gateway gave the id of this answer to another one, so nothing is known of it: tell its operator")
    return facts


def _agrees(usage: object, facts: Facts) -> bool:
    """Whether the answer's counts are those of the receipt. Nobody signed the id by which it was found."""
    if facts.receipt is None:
        return usage is None
    paid = claimed(facts, facts.receipt)
    for prompt, completion in _COUNTS:
        if isinstance(told := getattr(usage, prompt, None), int):
            return (told, getattr(usage, completion, 0) or 0) == (paid.prompt, paid.completion)
    return True
