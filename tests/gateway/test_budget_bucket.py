"""Budgets on the path of a request, while their bucket on the fabric is away or answers late."""

from __future__ import annotations

import asyncio

import pytest

from lacre import problems
from lacre_fabric.nats.kv import Bucket, Entry
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.budget.ledger import DRAW_LIMIT
from parts.stage import until

from .conftest import PutUp
from .test_refusals import assert_problem

LEASED = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 640\n'  # of which a lease has one, and ten beyond


class Unavailable:
    """The bucket while NATS is away. asked: how often it was read."""

    asked = 0

    async def read(self, key: str) -> Entry | None:
        self.asked += 1
        raise FabricUnavailable("gone")

    async def write(self, key: str, value: bytes, revision: int) -> int:
        raise FabricUnavailable("gone")


@pytest.mark.slow
async def test_without_the_bucket_what_is_in_hand_is_served(put_up: PutUp) -> None:
    stage = await put_up(plans=LEASED)
    async with stage.fake_worker(), stage.http() as client:
        assert (await stage.post(client)).status_code == 200
        stage.gateway.budgets.bucket = Unavailable()
        codes = [(await stage.post(client)).status_code for _ in range(11)]
        assert codes == [200] * 10 + [503]
        assert_problem(await stage.post(client), problems.BUDGET_UNAVAILABLE)
        stage.gateway.budgets.bucket = stage.budgets
        assert (await stage.post(client)).status_code == 200


async def test_a_draw_is_tried_again_while_somebody_waits(put_up: PutUp) -> None:
    """As when the bucket's leader dies, and another is chosen."""
    stage = await put_up(plans=LEASED)
    async with stage.fake_worker(), stage.http() as client:
        stage.gateway.budgets.bucket = away = Unavailable()
        waiting = [asyncio.create_task(stage.post(client)) for _ in range(3)]
        await until(lambda: away.asked >= 2, DRAW_LIMIT)
        stage.gateway.budgets.bucket = stage.budgets
        assert [(await each).status_code for each in waiting] == [200, 200, 200]


class Late:
    """A bucket on a busy disk: what is written is there, but no answer comes in time. told: the writes that arrived."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.told = 0

    async def read(self, key: str) -> Entry | None:
        return await self._bucket.read(key)

    async def write(self, key: str, value: bytes, revision: int) -> int:
        await self._bucket.write(key, value, revision)
        self.told += 1
        raise FabricUnavailable("no answer in time")

    async def scan(self, begin: str, most: int) -> tuple[dict[str, list[bytes]], bool]:
        return await self._bucket.scan(begin, most)


async def test_a_write_whose_answer_comes_late_is_not_made_again(put_up: PutUp) -> None:
    stage = await put_up(plans=LEASED)
    async with stage.fake_worker(), stage.http() as client:
        stage.gateway.budgets.bucket = late = Late(stage.budgets)
        assert [each.status_code for each in await asyncio.gather(*(stage.post(client) for _ in range(3)))] == [200] * 3
        assert late.told <= 4  # one for each budget, and perhaps one more for requests that came later
        stage.gateway.budgets.bucket = stage.budgets
