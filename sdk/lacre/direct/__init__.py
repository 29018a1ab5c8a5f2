"""Clients of an app that is served with `lacre.asgi.Sealed`: without a gateway, and with the app's key pinned here.

Rules:
- A request leaves only if it is sealed to a key whose pin the caller gave. The server's published list only chooses among
  those, and proves nothing by itself.
- Everything that the application sends is sealed, its headers and its token too, because it trusts the app. Outside, only the
  address tells one caller from another.
- There is no manifest here, no receipt and no audit proof.

Open `sealing.py` first. `tools/unasync.py` writes `_sync.py` from `_async.py`.
"""

from lacre.direct._async import AsyncClient
from lacre.direct._sync import Client
from lacre.direct.sealing import BASE_URL, DirectSealing

__all__ = ["BASE_URL", "AsyncClient", "Client", "DirectSealing"]

for _client in (AsyncClient, Client):
    _client.__module__ = __name__  # its public place
