"""Error objects in the words of the API that a request speaks: OpenAI's, and Anthropic's on its paths.

Refusals come from outside the seal too: from a gateway, or from `lacre proxy`. They must read as the worker's do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import httpx2

from lacre import errors

_MESSAGES: Final = "/v1/messages"
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# The first match counts. Any other exception is a bug, and its answer is a bare 500.
_STATUS: Final[tuple[tuple[type[errors.LacreError], int], ...]] = (
    (errors.MessageTooLarge, 413),
    (errors.SettingsError, 500),
    (errors.UsageError, 400),
    (errors.NetworkError, 502),
    (errors.ProtocolError, 502),
    (errors.VerificationError, 502),
)


def speaks_messages(path: str) -> bool:
    """Whether this path is of Anthropic's Messages API. path: with or without a query."""
    bare = path.partition("?")[0]
    return bare == _MESSAGES or bare.startswith(_MESSAGES + "/")


def message_error(status: int, message: str, members: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Anthropic's error object. members: others that its clients keep unread."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {**(members or {}), "type": kind, "message": message}}


def shaped(path: str, status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """The document of an error. error: OpenAI's members, with its `message`."""
    if not speaks_messages(path):
        return {"error": dict(error)}
    document = message_error(status, str(error["message"]), {name: each for name, each in error.items() if name != "param"})
    request_id = error.get("request_id")
    return document if request_id is None else {**document, "request_id": request_id}


def explained(error: errors.LacreError) -> dict[str, Any]:
    """The error in OpenAI's shape: what happened, what helps, and the checks that were made by then."""
    message, code = str(error).rstrip("."), re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    helps = error.remedy if error.remedy not in message else ""
    checked = None if error.verification is None else error.verification.members()
    told = {"message": f"{message}. {helps}".strip(" ."), "type": "lacre_error", "param": None, "code": code}
    return {"error": {**told, "remedy": error.remedy, "request_id": error.request_id, "verification": checked}}


def status_of(error: errors.LacreError) -> int:
    """The HTTP status for a client's error."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return 504 if isinstance(error, httpx2.TimeoutException) else status
