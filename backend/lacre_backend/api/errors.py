"""The API's errors: OpenAI's error object, made in this file only.

Rules:
- A message may repeat names and numbers of the request, because it returns sealed to its sender. It never contains anything of
  another request, or the text of an internal exception.
- Nothing here is logged.
"""

from __future__ import annotations

from typing import Any, Final

from lacre.errors import UsageError

INVALID_REQUEST: Final = "invalid_request_error"
SERVER_ERROR: Final = "server_error"


class RequestRefused(UsageError):
    """A request that is refused. status, code, param, type: as in OpenAI's error object."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None, type: str = INVALID_REQUEST
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.type = type

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def model_not_found(name: str) -> RequestRefused:
    return RequestRefused(
        f"The model `{name}` does not exist or you do not have access to it.", status=404, code="model_not_found", param="model"
    )


def context_length_exceeded(n_ctx: int, n_prompt: int | None, param: str) -> RequestRefused:
    """n_prompt: None if the prompt is so long that it was not counted."""
    size = "far more" if n_prompt is None else f"{n_prompt} tokens"
    return RequestRefused(
        f"This model's maximum context length is {n_ctx} tokens. However, your {param} resulted in {size}. "
        f"Please reduce the length of the {param}.",
        code="context_length_exceeded",
        param=param,
    )


def text_refused(param: str) -> RequestRefused:
    return RequestRefused(
        f"The model's tokenizer cannot read '{param}': it takes more time or memory than a text may. "
        "Break up very long runs without spaces, or of spaces, or shorten the text.",
        code="text_not_tokenizable",
        param=param,
    )


def unsupported(param: str, remedy: str = "Omit it.") -> RequestRefused:
    return RequestRefused(f"'{param}' is not supported by this server. {remedy}", code="unsupported_parameter", param=param)


def grant_mismatch(message: str, param: str) -> RequestRefused:
    """The sealed request asks for something other than the gateway allowed."""
    return RequestRefused(message, status=403, code="grant_mismatch", param=param)


def other_model(name: str) -> RequestRefused:
    """Only the model that began an answer may continue it."""
    return RequestRefused(
        f"Another file of `{name}` began this answer than the one served here. Send the request again without `resume`.",
        status=409,
        code="model_changed",
        param="resume.digest",
    )


def grammar_too_costly() -> RequestRefused:
    """The time limit for enforcing a schema is used up by this request."""
    return RequestRefused(
        "Enforcing the schema took more time than a request may use. Use fewer optional properties and alternatives.",
        code="schema_too_costly",
        param="response_format",
    )


def not_scored() -> RequestRefused:
    return RequestRefused(
        "The time for one run ended before the answer was scored. Shorten the messages or the answer.", code="time_limit"
    )


def lens_unsupported() -> RequestRefused:
    """The architecture's layers cannot be read."""
    return RequestRefused(
        "The layers of this model cannot be read through its output: its architecture is another one. Omit 'lens'.",
        code="lens_unsupported",
        param="lens",
    )


def engine_failed() -> RequestRefused:
    return RequestRefused("The model failed while it answered. Try again.", status=500, type=SERVER_ERROR)


def shutting_down() -> RequestRefused:
    return RequestRefused("The worker is shutting down. Try again.", status=503, type=SERVER_ERROR)
