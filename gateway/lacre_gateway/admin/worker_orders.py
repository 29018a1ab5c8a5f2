"""Orders one worker to take no more work, or to take work again, for an administrator whom a rule permits it.

A gateway holds no key to a worker's process. It signs an order with the key that signs its grants, and the worker obeys: see
`lacre_fabric.work.drain_orders`. The worker's presence shows that it did. Until then the gateway sends a new order each second.
"""

from __future__ import annotations

import asyncio
from typing import Final

from lacre_fabric.work.contract import SeenWorker
from lacre_fabric.work.drain_orders import LIVES, DrainOrder
from lacre_gateway.admin.reports import WorkerNamed, WorkerOrdered
from lacre_gateway.admin.worker_problems import DEAF, NO_WORKER, SILENT
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.refusal import Refusal

PATIENCE: Final = 6.0  # seconds for the worker to say so: its presence comes at once, and each second
_AGAIN: Final = 1.0  # seconds until the next order, if the worker did not hear the last one
_LOOK: Final = 0.05  # seconds


async def order(gateway: Gateway, named: WorkerNamed, request_id: str, *, drain: bool) -> WorkerOrdered:
    """For a caller who may. request_id: of the call, by which the worker's log names it.

    Raises Refusal or FabricUnavailable.
    """
    fabric, place = gateway.connected(), (named.pool, named.region, named.node)

    def seen() -> SeenWorker:
        found = fabric.seen().get(place)
        if found is None:
            raise Refusal(NO_WORKER, noted=f"no live worker {named.target}")
        return found

    if not seen().hears:
        raise Refusal(DEAF, noted=f"worker {named.target} is of an older version, or NATS lets it hear no offers")
    loop = asyncio.get_running_loop()
    deadline, next_at = loop.time() + PATIENCE, 0.0
    while seen().drained is not drain:
        if loop.time() >= deadline:
            raise Refusal(SILENT, noted=f"worker {named.target} did not say that it obeyed")
        if loop.time() >= next_at:
            next_at = loop.time() + _AGAIN
            now = gateway.clock()
            made = DrainOrder(request_id, now, now + LIVES, *place, drain)
            await fabric.order(*place, made.sign(gateway.signer))
        await asyncio.sleep(_LOOK)
    what = "drain" if drain else "resume"
    gateway.log.info("worker ordered", pool=named.pool, node=named.node, kind=what, request_id=request_id)
    others = sum(pool == named.pool and bool(one.models) for (pool, *at), one in fabric.seen().items() if (pool, *at) != place)
    return WorkerOrdered(
        pool=named.pool, region=named.region, node=named.node, drained=drain, busy=seen().busy, others=others
    )  # fmt: skip
