"""The one thing that the programs beside this file change: what their clients are made with. `SEALED` names the adapter."""

from __future__ import annotations

import os
from typing import Any

from lacre import BASE_URL

if os.environ["SEALED"] == "legacy":
    from lacre.legacy import AsyncClient, Client
else:
    from lacre import AsyncClient, Client

CHAT = "smollm2-135m"
EMBED = "all-minilm-l6-v2"


def arguments() -> dict[str, Any]:
    """For `openai.OpenAI(...)`."""
    return {"http_client": Client(), "base_url": BASE_URL, "api_key": "sealed"}


def async_arguments() -> dict[str, Any]:
    """For `openai.AsyncOpenAI(...)`."""
    return {"http_client": AsyncClient(), "base_url": BASE_URL, "api_key": "sealed"}
