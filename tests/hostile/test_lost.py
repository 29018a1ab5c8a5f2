"""A request that ends whichever worker begins it, against all workers of the pool."""

from __future__ import annotations

from hostile.adversary import AsgiWire, HostileFabric
from hostile.attacks import Verdict, attack
from hostile.honest import HonestGateway
from hostile.stage import Stage
from lacre import problems


@attack(
    "end one worker after another by one call that ends each",
    by="client",
    defence="a request that was delivered before is not begun again, and the SDK counts the workers that a call was lost by",
    refused=problems.UNCLAIMED,
    gain="two workers for each call of the SDK's, one for each sealed request",
)
async def test_one_after_another(
    stage: Stage, honest: HonestGateway, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict
) -> None:
    worker = await stage.worker()
    fabric.lost = 1  # each request has ended a worker already when this one gets it
    with verdict.refused():
        await stage.client(wire, honest.token, retries=5, resume=5).chat(stage.prompt)
    assert (len(fabric.works), worker.calls) == (2, 0)
