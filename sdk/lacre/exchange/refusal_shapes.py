"""Error objects in the words of the API that a request speaks: OpenAI's, and Anthropic's on its paths.

Refusals come from outside the seal too: from a gateway, or from `lacre proxy`. They must read as the worker's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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
