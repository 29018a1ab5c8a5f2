"""The manifest that this gateway serves, and routes by. It can make none: every document is verified before it is used.

Rules:
- Only a document that verifies under the pinned root replaces the one in use, and only with a higher version.
- An expired manifest serves nobody: clients would refuse it, and so does the gateway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from lacre import problems
from lacre.manifest import Manifest, Pool
from lacre.memory import VersionMemory, accept
from lacre.trust import Trusted
from lacre.wire.header import SealedHeader
from lacre_gateway.outer import Outer
from lacre_gateway.refusal import Refusal

_RETRY: float = 5.0  # seconds: a publication takes about as long to reach a gateway


class CurrentManifest:
    """The newest verified document so far. root: the pinned key. clock: seconds since the epoch."""

    def __init__(self, root: bytes, clock: Callable[[], float]) -> None:
        self._root = root
        self._clock = clock
        self._memory = VersionMemory()
        self._trusted: Trusted | None = None
        self.etag = ""

    def offer(self, document: bytes) -> bool:
        """Whether the document is now the one in use, and was not before.

        Raises VerificationError or ProtocolError; the one in use stays.
        """
        trusted = accept(document, self._root, self._memory, self._clock())
        if self._trusted is not None and trusted.document == self._trusted.document:
            return False
        self._trusted = trusted
        # RFC 9110 section 8.8.3: quoted, and another one for other bytes.
        self.etag = f'"{hashlib.sha256(trusted.document).hexdigest()[:32]}"'
        return True

    @property
    def newest(self) -> Manifest | None:
        """The manifest in use, expired or not."""
        return None if self._trusted is None else self._trusted.manifest

    @property
    def valid(self) -> bool:
        return self._trusted is not None and self._clock() < self._trusted.manifest.expires_at

    def require(self) -> Trusted:
        """Raises Refusal where there is no manifest, or only an expired one."""
        if self._trusted is None or not self.valid:
            raise Refusal(problems.NOT_READY, retry_after=_RETRY)
        return self._trusted

    def pool_for(self, outer: Outer, header: SealedHeader) -> Pool:
        """The pool that can open this request and serves this model. Raises Refusal."""
        pool = self.require().manifest.pools.get(outer.pool)
        if pool is None or outer.model not in pool.models:
            raise Refusal(problems.UNKNOWN_POOL)
        if outer.shape not in pool.shapes:
            raise Refusal(problems.INVALID_HEADERS)
        now = self._clock()
        if not any(
            key.config.key_id == header.key_id and key.config.offers(header.suite) and now < key.not_after for key in pool.keys
        ):
            raise Refusal(problems.UNKNOWN_KEY)
        return pool
