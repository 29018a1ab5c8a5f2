"""The clients of the `openai` package, sealed: `lacre.OpenAI()` and `lacre.AsyncOpenAI()`; the extra `openai` installs it.

They are that package's own classes with a sealed client inside, and work as its documentation says. Their `api_key` is not
sent: the gateway asks for Lacre's token. They do not retry by themselves: Lacre does (`retries`), because it knows which
requests may run twice, and reports it (`attempts`).
"""

from __future__ import annotations

from typing import Final, Unpack

import httpx2

from lacre.client import BASE_URL, DEFAULT_TIMEOUT, AsyncClient, Client
from lacre.transport.options import AsyncOptions, Options

try:
    import openai
except ModuleNotFoundError as exc:
    raise ImportError("lacre.OpenAI needs the openai package: pip install 'lacre[openai]'") from exc

API_KEY: Final = "sealed"  # the package requires one


def OpenAI(
    url: str | None = None,
    *,
    timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
    max_retries: int = 0,
    **options: Unpack[Options],
) -> openai.OpenAI:
    """An `openai.OpenAI` that seals every request. url and options: as for `lacre.Client`, which is closed with it."""
    sealed = Client(url, **options)
    return openai.OpenAI(http_client=sealed, base_url=BASE_URL, api_key=API_KEY, timeout=timeout, max_retries=max_retries)


def AsyncOpenAI(
    url: str | None = None,
    *,
    timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
    max_retries: int = 0,
    **options: Unpack[AsyncOptions],
) -> openai.AsyncOpenAI:
    """The async twin of `OpenAI`."""
    sealed = AsyncClient(url, **options)
    return openai.AsyncOpenAI(http_client=sealed, base_url=BASE_URL, api_key=API_KEY, timeout=timeout, max_retries=max_retries)
