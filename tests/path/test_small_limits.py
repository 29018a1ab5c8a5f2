"""The whole path under a limit of 300 tokens: the SDK pads and seals, the gateway reserves what fits, a real worker counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lacre
from lacre_backend.api.app import REPEATABLE, WEIGHED
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage

PLANS = 'default_plan = "p"\n[plans.p.user]\ntokens_per_day = 300\n'


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """With a worker whose engine takes a token for each byte."""
    async with Stage.on_air(tmp_path, Issuer(), plans=PLANS) as stage:
        await stage.worker(repeatable=REPEATABLE, weighs=WEIGHED)
        yield stage


@pytest.fixture
def client(stage: Stage) -> lacre.AsyncClient:
    return stage.client()


async def test_a_greeting_is_served_as_often_as_it_fits(stage: Stage, client: lacre.AsyncClient) -> None:
    for number in range(1, 4):
        reply = await client.chat("hi", model=MODEL, max_tokens=16)
        assert reply.text == "hi"
        await stage.trail(number)
    used = [entry["prompt_tokens"] + entry["completion_tokens"] for entry in await stage.trail(3) if entry["kind"] == "outcome"]
    assert 0 < sum(used) < 300


async def test_a_prompt_of_more_than_is_left_is_refused_by_the_worker(stage: Stage, client: lacre.AsyncClient) -> None:
    with pytest.raises(lacre.ApiError) as refused:
        await client.chat("x" * 400, model=MODEL, max_tokens=16)
    assert refused.value.code == "grant_mismatch"
    assert "granted 284" in str(refused.value)
    outcome = (await stage.trail())[1]
    assert (outcome["prompt_tokens"], outcome["completion_tokens"], outcome["money"]) == (0, 0, 0), "it cost nothing"
    assert (await client.chat("hi", model=MODEL, max_tokens=16)).text == "hi"


async def test_too_much_output_is_told_with_what_would_fit(client: lacre.AsyncClient) -> None:
    with pytest.raises(lacre.Forbidden, match="max_tokens of 236 or less") as refused:
        await client.chat("hi", model=MODEL, max_tokens=4000)
    assert refused.value.details["fits"] == 236
    assert (await client.chat("hi", model=MODEL, max_tokens=236)).text == "hi"


async def test_no_named_output_gets_what_the_limit_has(stage: Stage, client: lacre.AsyncClient) -> None:
    assert (await client.chat("hi", model=MODEL)).text == "hi"
    [intent] = [entry for entry in await stage.trail() if entry["kind"] == "intent"]
    assert (intent["max_tokens"], intent["reserved_tokens"], intent["reserved_prompt_tokens"]) == (4096, 256, 44)
