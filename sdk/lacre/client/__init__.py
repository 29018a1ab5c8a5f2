"""The clients that applications use: `httpx2` clients that seal every request, with methods for chat.

Open `_async.py` first. `tools/unasync.py` writes `_sync.py` from it; `settings.py` has the defaults of both.
"""

from lacre.client._async import AsyncClient
from lacre.client._sync import Client
from lacre.client.manifest import fetch_manifest
from lacre.client.settings import BASE_URL, DEFAULT_RESUMES, DEFAULT_TIMEOUT, EventHooks

__all__ = ["BASE_URL", "DEFAULT_RESUMES", "DEFAULT_TIMEOUT", "AsyncClient", "Client", "EventHooks", "fetch_manifest"]

for _client in (AsyncClient, Client):
    _client.__module__ = __name__  # its public place, for its representation and for errors
