"""The clients of the `openai` package, sealed: `lacre.OpenAI()` and `lacre.AsyncOpenAI()`; the extra `openai` brings it.

They are that package's own classes with a sealed client inside; what is not said here is theirs. Its `api_key` goes nowhere:
the gateway asks for Lacre's token. Nor do they try again by themselves: Lacre does (`retries`), knowing what may run twice, and
tells (`attempts`).
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

API_KEY: Final = "sealed"  # the package insists on one


def OpenAI(
    url: str | None = None,
    *,
    timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
    max_retries: int = 0,
    **options: Unpack[Options],
) -> openai.OpenAI:
    """An `openai.OpenAI` whose every request is sealed. url and options: as for `lacre.Client`, which is closed with it."""
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
