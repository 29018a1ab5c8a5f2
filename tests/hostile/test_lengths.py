"""What lengths tell the gateway of a prompt and of an answer's tokens."""

from __future__ import annotations

from hostile.adversary import GatewayOwner, SealedAnswer
from hostile.attacks import attack
from parts.stage import Stage

# One character of each is one token's text, and of very different lengths in JSON and UTF-8.
TEXTS = ("aaaaaaaa", "\x01\x02\x03\x04\x05\x06\x07\x08", "日本語日本語日本")


async def record_lengths(stage: Stage, gateway: GatewayOwner, text: str, **options: str) -> list[int]:
    client = stage.client(gateway, **options)
    assert "".join([piece async for piece in client.chat_stream(text)]) == text
    answer = SealedAnswer.parse(gateway.answers[-1])
    return [len(chunk) for chunk in answer.chunks]


@attack("tell the tokens of a streamed answer by the lengths of its records", "gateway",
        "shape `pad`: each record is as long as the others", gain="the number of records, and when each leaves")  # fmt: skip
async def test_records(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    padded = {length for text in TEXTS for length in await record_lengths(stage, gateway, text)}
    assert len(padded) == 1
    bare = {length for text in TEXTS for length in await record_lengths(stage, gateway, text, shape="none")}
    assert len(bare) > 2  # the attack itself works


@attack("tell a whole answer by its length", "gateway", "shape `pad`: an answer falls into a bucket",
        gain="the bucket: steps of 12 % above 4 KiB, one bucket below")  # fmt: skip
async def test_whole(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    client, lengths = stage.client(gateway), set()
    for text in ("no", "yes", stage.prompt, "x" * 400):
        assert (await client.chat(text)).text == text
        lengths.add(len(gateway.answers[-1]))
    assert len(lengths) == 1


@attack("tell a prompt by the length of its sealed request", "gateway", "shape `pad`: a request falls into a bucket",
        gain="the bucket: steps of 12 % above 4 KiB, one bucket below")  # fmt: skip
async def test_requests(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    client, lengths = stage.client(gateway), set()
    for text in ("no", "yes", stage.prompt, "x" * 1000):
        await client.chat(text, max_tokens=1)
        lengths.add(len(gateway.posts[-1].content))
    assert len(lengths) == 1
