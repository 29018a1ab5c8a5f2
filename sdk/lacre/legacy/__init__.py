"""The sealed client for programs that are still on `httpx`, `openai` 2.x among them: `pip install 'lacre[httpx]'`.

Rules:
- Nothing is sealed or decided here. A request becomes one of `httpx2`, `lacre.Client` seals it, and its answer comes back as
  `httpx`'s: one implementation, and this adapter.
- httpx's exceptions are made here and nowhere else; every other error is Lacre's own.

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
    _public.__module__ = __name__  # where programs find it
