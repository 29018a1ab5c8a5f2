"""The sealed client for programs that still use `httpx`, such as `openai` 2.x: `pip install 'lacre[httpx]'`.

Rules:
- Nothing is sealed or decided here. This adapter turns a request into one of `httpx2`, `lacre.Client` seals it, and its answer
  comes back as one of `httpx`.
- Only this package makes httpx's exceptions; every other error is Lacre's own.

Open `_async.py` first. `tools/unasync.py` writes `_sync.py` from it; `messages.py` turns httpx's types into httpx2's and back.
"""

try:
    import httpx  # noqa: F401 - what the imports below need
except ModuleNotFoundError as exc:
    raise ImportError("lacre.legacy is for programs on httpx: pip install 'lacre[httpx]'") from exc

from lacre.legacy._async import AsyncClient, AsyncTransport
from lacre.legacy._sync import Client, Transport
from lacre.legacy.messages import DEFAULT_TIMEOUT, EventHooks, TimedOut, Unreachable

__all__ = [
    "DEFAULT_TIMEOUT",
    "AsyncClient",
    "AsyncTransport",
    "Client",
    "EventHooks",
    "TimedOut",
    "Transport",
    "Unreachable",
]

for _public in (AsyncClient, Client, TimedOut, Unreachable):
    _public.__module__ = __name__  # its public place
