"""A worker of this process that obeys a gateway's orders, as the process of a real one does."""

from __future__ import annotations

from lacre_backend.node.ordered_drain import OrderedDrain
from lacre_fabric.nats.subjects import DEFAULT_REGION
from parts.memory_fabric import MemoryWorker
from parts.stage import Stage


def obedient(stage: Stage, fabric: MemoryWorker, node: str = "node-0") -> OrderedDrain:
    """node: as the fabric in memory names it."""
    ordered = OrderedDrain(stage.manifest, stage.pool, DEFAULT_REGION, node)
    fabric.version, fabric.on_order, fabric.drained = "1.0", ordered.obey, lambda: ordered.reason() is not None
    return ordered
