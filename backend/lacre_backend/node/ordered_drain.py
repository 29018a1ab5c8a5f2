"""Whether a gateway ordered this worker to take no more work.

Rules:
- An order counts only if a key of the manifest that verifies grants signed it, for this worker, while that manifest is valid.
- It counts only if it is newer than the newest one that was obeyed: nobody can send an older one again.
- A drained worker finishes its streams, keeps its models loaded and goes on announcing itself, with no model. It ends by an
  order to take work again, or with the process: a restart is the operator's own way back, without any gateway.
- The log has each order with the id of the administrator's call. The gateway's audit log has the name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from lacre.errors import Expired, LacreError
from lacre.trust.manifest import Manifest
from lacre_backend.node.readiness import Reason
from lacre_fabric.work.drain_orders import DrainOrder
from lacre_fabric.work.presence import DRAINED

_DRAINED: Final = Reason(
    DRAINED,
    "an administrator drained this worker through a gateway",
    "`lacre admin resume-worker` lets it take work again; so does a restart",
)

_TELL_EVERY: Final = 10.0  # seconds between refusals in the log: nobody can fill a disk with them

log = structlog.get_logger("lacre.worker")


class OrderedDrain:
    """manifest: raises LacreError while there is none. clock: seconds since the epoch."""

    def __init__(
        self, manifest: Callable[[], Manifest], pool: str, region: str, node: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._manifest = manifest
        self._place = pool, region, node
        self._clock = clock
        self._newest = 0.0  # when the newest order that was obeyed was made
        self._drained = False
        self._told = 0.0  # when the log last had a refusal

    def reason(self) -> Reason | None:
        """For `Readiness`."""
        return _DRAINED if self._drained else None

    def obey(self, token: bytes) -> bool:
        """Whether the worker now does something else. The log has refused orders."""
        now = self._clock()
        try:
            manifest = self._manifest()
            if now >= manifest.expires_at:
                raise Expired("the manifest has expired, so its key no longer verifies orders")
            order = DrainOrder.verify(token.decode("ascii"), manifest.gateway_keys, now)
        except (LacreError, UnicodeDecodeError) as exc:
            return self._refuse(type(exc).__name__, now)
        if (order.pool, order.region, order.node) != self._place:
            return self._refuse("another worker's", now)
        if order.iat <= self._newest:
            return self._refuse("not newer", now)
        self._newest = order.iat
        if order.drain is self._drained:
            return False
        self._drained = order.drain
        log.warning("worker.drained" if order.drain else "worker.resumed", request_id=order.request_id)
        return True

    def _refuse(self, kind: str, now: float) -> bool:
        if abs(now - self._told) >= _TELL_EVERY:
            self._told = now
            log.warning("order.refused", kind=kind)
        return False
