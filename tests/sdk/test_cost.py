"""What an answer costs: its receipts' tokens at the prices that the program was told, by the gateway's own rule."""

from __future__ import annotations

import asyncio
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre.evidence.prices import TokenPrice, prices_of
from lacre_backend.api.app import create_app
from lacre_gateway.budget import plans
from parts.echo_engine import EchoEngine
from parts.relay import Relay, connect, connect_async

TINY = {"prompt": "0.5", "cached": "0.05", "completion": "1.5"}
OTHERS = {"prompt": "10", "cached": "10", "completion": "10"}
PRICES = {"tiny": TINY, "*": OTHERS}
FILE = """
default_plan = "one"
[plans.one.user]
[prices."*"]
prompt = "0.10"
cached = "0.01"
completion = "0.400001"
[prices.tiny]
prompt = "1234.5"
cached = "0"
completion = "999999999999.999999"
"""
COUNTS = st.integers(0, 10**7)


def due(receipt: lacre.Receipt, table: dict[str, str] = TINY) -> Decimal:
    """By hand, for few tokens."""
    fresh = receipt.prompt_tokens - receipt.cached_tokens
    exact = fresh * Decimal(table["prompt"]) + receipt.cached_tokens * Decimal(table["cached"])
    exact += receipt.completion_tokens * Decimal(table["completion"])
    return exact.to_integral_value("ROUND_CEILING") / 1_000_000


@given(fresh=COUNTS, cached=COUNTS, completion=COUNTS, model=st.sampled_from(["*", "tiny"]))
def test_the_rule_is_the_gateways(fresh: int, cached: int, completion: int, model: str) -> None:
    """Both read the same table."""
    theirs = plans.parse(FILE, Path("plans.toml")).prices[model]
    mine = prices_of(tomllib.loads(FILE)["prices"])[model]
    assert mine == TokenPrice(theirs.prompt, theirs.cached, theirs.completion)
    assert mine.of(fresh + cached, cached, completion) == theirs.of(fresh + cached, cached, completion)


def test_a_reply_a_stream_and_an_object_of_openai(relay: Relay) -> None:
    with connect(relay, prices=PRICES) as client:
        reply = client.chat("Hello.")
        assert reply.cost == due(reply.receipt) > 0 and str(reply.cost) in repr(reply)
        stream = client.chat_stream("Hello.")
        assert stream.cost is None
        next(stream)
        assert stream.cost is None
        assert stream.reply().cost == stream.cost == due(stream.receipt or reply.receipt)
        other = client.with_options(model="other").chat("Hello.")
        assert other.cost == due(other.receipt, OTHERS) != reply.cost
        program = openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)
        raw = program.chat.completions.with_raw_response.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        assert lacre.info(raw).cost == reply.cost

    async def ask() -> lacre.Reply:
        async with connect_async(relay, prices=PRICES) as client:
            return await client.chat("Hello.")

    assert asyncio.run(ask()).cost == reply.cost


@pytest.mark.parametrize("prices", [None, {}, {"another": TINY}], ids=["none", "an empty table", "of another model"])
def test_unknown_prices(relay: Relay, prices: Any) -> None:
    with connect(relay, prices=prices) as client:
        assert client.chat("Hello.").cost is None


def test_an_answer_of_two_requests_costs_both() -> None:
    """Each is rounded up by itself, as the gateway charges it."""
    relay = Relay(create_app([EchoEngine(name="tiny")]))
    left = [7]
    relay.bend = lambda pieces: pieces[: left.pop()] if left else pieces
    with connect(relay, prices=PRICES) as client:
        stream = client.chat_stream("A long line of words.", max_tokens=400)
        assert stream.reply().text == "A long line of words."
    [part], last = stream.parts, stream.receipt
    assert part.completion > 0 and last is not None
    price = prices_of(PRICES)["tiny"]
    told = [(each.prompt, each.cached, each.completion) for each in (part,)]
    told.append((last.prompt_tokens, last.cached_tokens, last.completion_tokens))
    assert stream.cost == Decimal(sum(price.of(*each) for each in told)) / 1_000_000 > due(last)


@pytest.mark.parametrize(
    "prices",
    [
        "0.10", [TINY], {"tiny": "0.10"}, {"tiny": {**TINY, "prompt": 0.1}}, {"tiny": {**TINY, "prompt": "-1"}},
        {"tiny": {**TINY, "prompt": "NaN"}}, {"tiny": {**TINY, "prompt": "0.0000001"}}, {"tiny": {**TINY, "prompt": "1e30"}},
        {"tiny": {**TINY, "prompt": "ten"}}, {"tiny": {**TINY, "promt": "1"}}, {"tiny": {"prompt": "1"}}, {"": TINY}, {3: TINY},
    ],
    ids=repr,
)  # fmt: skip
def test_mistakes(relay: Relay, prices: Any) -> None:
    with pytest.raises(lacre.UsageError, match="prices"):
        connect(relay, prices=prices)
