"""Refusals if the upstream does not answer as it should: fixed texts, without any exception's text."""

from __future__ import annotations

from typing import Final

from lacre_backend.api.errors import SERVER_ERROR, RequestRefused

_OPERATOR: Final = "Its operator finds the reason in the worker's log."


def unavailable() -> RequestRefused:
    return _failed("This model's server cannot be reached. Try again later.", "upstream_unavailable")


def timed_out() -> RequestRefused:
    return _failed("This model's server took too long. Ask for less, or try again later.", "upstream_timeout", status=504)


def broken() -> RequestRefused:
    return _failed("This model's server broke off its answer. Try again.", "upstream_broken")


def unusable(what: str) -> RequestRefused:
    """what: the fault of the answer, in our own words."""
    return _failed(f"This model's server {what}, so its answer was not forwarded. {_OPERATOR}", "upstream_unusable")


def too_large(limit: int) -> RequestRefused:
    """limit: bytes."""
    return _failed(f"The answer is larger than {limit} bytes, this worker's limit.", "answer_too_large")


def above_units(granted: int) -> RequestRefused:
    return RequestRefused(
        f"The answer is larger than the {granted} KiB that were granted. Send a larger `lacre-max-tokens`.",
        status=413,
        code="answer_too_large",
        param="lacre-max-tokens",
    )


def unknown_url(method: str, path: str) -> RequestRefused:
    return RequestRefused(f"Unknown request URL: {method} {path}.", status=404, code="unknown_url")


def method_not_supported(method: str, path: str) -> RequestRefused:
    return RequestRefused(f"Not allowed to {method} on {path}.", status=405, code="method_not_supported")


def coded() -> RequestRefused:
    return RequestRefused("The request's body is compressed. Send it as it is.", status=415, code="content_encoding")


def _failed(message: str, code: str, *, status: int = 502) -> RequestRefused:
    return RequestRefused(message, status=status, code=code, type=SERVER_ERROR)
