"""`lacre.info`: receipts and checks behind an object of another package: an answer of `openai` or of `anthropic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lacre.chat.reply import claimed
from lacre.errors import UsageError
from lacre.evidence.exchange_info import Facts
from lacre.evidence.recent import RECENT
from lacre.transport.sealed import FACTS

_HOLDERS: Final = ("http_response", "response", "_response")  # where an object of these packages keeps its response
_COUNTS: Final = (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))  # names in their APIs
_CACHED: Final = ("cache_read_input_tokens", "cache_creation_input_tokens")  # Anthropic's: `input_tokens` does not have these


def info(answer: object) -> Facts:
    """The receipt, the audit proof and the checks of the exchange that an answer came from.

    answer: of `openai` or `anthropic`: a whole answer, a stream, a raw response or an error; or a response of `httpx2` or
    `httpx`. A whole answer keeps only the request's id; this process knows its newest 1,024 exchanges. Raises UsageError for
    any other object.
    """
    for holder in (answer, *(getattr(answer, name, None) for name in _HOLDERS)):
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
            told += sum(getattr(usage, name, None) or 0 for name in _CACHED)
            return (told, getattr(usage, completion, 0) or 0) == (paid.prompt, paid.completion)
    return True
