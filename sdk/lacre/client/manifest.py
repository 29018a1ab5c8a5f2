"""The pool's manifest, fetched and verified without a client."""

from __future__ import annotations

import httpx2

from lacre.client.settings import DEFAULT_TIMEOUT, OUTER_HEADERS, memory_of
from lacre.exchange.call import Sealing
from lacre.runtime import arguments
from lacre.transport.dial import Dial, Verify, outer
from lacre.transport.sealed_sync import SealedTransport
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import Memory


def fetch_manifest(url: str | None = None, *, memory: Memory | None = None, verify: Verify = True) -> Manifest:
    """The manifest that the gateway serves, verified against the root pinned in `url` (`LACRE_URL`). Needs no token."""
    where = ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL"))
    dial: Dial[httpx2.BaseTransport] = Dial(where.base_url, OUTER_HEADERS, DEFAULT_TIMEOUT, arguments.verify(verify))
    with SealedTransport(Sealing(where.root, memory_of(memory)), outer(dial), "") as sealed:
        return sealed.manifest()
