"""An error in the shape of the API whose path was asked."""

from __future__ import annotations

from typing import Any

from lacre.exchange.refusal_shapes import speaks_messages
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.messages import message_error


def refused_at(path: str, refusal: RequestRefused) -> dict[str, Any]:
    """path: without its query. Anthropic's shape below `/v1/messages`, OpenAI's everywhere else."""
    return message_error(refusal) if speaks_messages(path) else refusal.body()
