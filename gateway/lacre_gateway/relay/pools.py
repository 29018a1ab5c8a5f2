"""Serves the manifest and routes by it. `lacre_fabric.nats.manifest_feed` fetches and verifies it; the gateway cannot make
one.
"""

from __future__ import annotations

import hashlib
from typing import Final

from lacre import problems
from lacre.trust.manifest import Pool
from lacre.wire.header import SealedHeader
from lacre.wire.outer import SHAPE
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_gateway.http.headers import OuterHeaders
from lacre_gateway.http.refusal import Refusal

_RETRY: Final = 5.0  # seconds: a publication takes about as long to reach a gateway


def require(feed: ManifestFeed) -> ManifestFeed:
    """The feed, if it has a manifest that clients would accept. Raises Refusal."""
    if not feed.ready:
        failure = "" if feed.failure is None else f" ({type(feed.failure).__name__})"
        noted = "expired" if feed.known else "none was read"
        raise Refusal(problems.NOT_READY, retry_after=_RETRY, noted=f"manifest: {noted}{failure}")
    return feed


def etag(document: bytes) -> str:
    """Differs for other bytes (RFC 9110 section 8.8.3)."""
    return f'"{hashlib.sha256(document).hexdigest()[:32]}"'


def pool_for(feed: ManifestFeed, outer: OuterHeaders, header: SealedHeader, now: float) -> Pool:
    """The pool that can open this request and serves this model. now: seconds since the epoch. Raises Refusal."""
    pools = require(feed).manifest.pools
    pool = pools.get(outer.pool)
    if pool is None:
        raise Refusal(problems.UNKNOWN_POOL, details={"pools": tuple(sorted(pools))})
    if outer.model not in pool.models:
        raise Refusal(problems.UNKNOWN_POOL, details={"models": tuple(pool.models)})
    if outer.shape not in pool.shapes:
        raise Refusal(problems.INVALID_HEADERS, details={"header": SHAPE})
    for key in pool.keys:
        if key.config.key_id == header.key_id and now < key.not_after and key.config.offers(header.suite):
            return pool
    raise Refusal(problems.UNKNOWN_KEY)
