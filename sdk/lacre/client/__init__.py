"""The clients that applications use: `httpx2` clients that seal every request, with methods for chat.

Open `_async.py` first. `tools/unasync.py` writes `_sync.py` from it; `settings.py` has the defaults of both.
"""

from typing import TYPE_CHECKING

from lacre.client._sync import Client
from lacre.client.manifest import fetch_manifest
from lacre.client.settings import BASE_URL, DEFAULT_RESUMES, DEFAULT_TIMEOUT, EventHooks
from lacre.exchange.call import ORIGIN

if TYPE_CHECKING:
    from lacre.client._async import AsyncClient

__all__ = ["BASE_URL", "DEFAULT_RESUMES", "DEFAULT_TIMEOUT", "ORIGIN", "AsyncClient", "Client", "EventHooks", "fetch_manifest"]

Client.__module__ = __name__  # its public place, for its representation and for errors


def __getattr__(name: str) -> object:
    """Imports the async half at its first use: programs without asyncio do not pay for it."""
    if name == "AsyncClient":
        from lacre.client._async import AsyncClient  # noqa: PLC0415 - see above

        AsyncClient.__module__ = __name__
        globals()[name] = AsyncClient
        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
