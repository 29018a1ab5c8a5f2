"""Clients of an app that is served with `lacre.asgi.Sealed`: no gateway between, and the app's key pinned here.

Rules:
- The request is sealed to a key whose pin the caller gave, or it does not leave. What the server publishes is a choice among
  those, and proves nothing by itself.
- What the application sends is inside, its headers and its token too: the app is the party that it trusts. Outside is nothing
  that tells one caller from another, but the address.
- There is no manifest here, no receipt and no audit proof.

Open `sealing.py` first. `tools/unasync.py` writes `_sync.py` from `_async.py`.
"""

from lacre.direct._async import AsyncClient
from lacre.direct._sync import Client
from lacre.direct.sealing import BASE_URL, DirectSealing

__all__ = ["BASE_URL", "AsyncClient", "Client", "DirectSealing"]

for _client in (AsyncClient, Client):
    _client.__module__ = __name__  # where programs find it
