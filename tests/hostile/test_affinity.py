"""What `Lacre-Affinity` tells the gateway that reads it."""

from __future__ import annotations

from hostile.adversary import HttpWire
from hostile.attacks import attack
from hostile.test_workers import LyingWorker
from lacre.exchange.affinity import affinity_of, beginning_of
from lacre.wire.header import SEALED_PATH
from lacre.wire.outer import AFFINITY, POOL
from parts.keys import MODEL
from parts.stage import Stage


@attack("guess how a conversation begins, by its affinity", "gateway",
        "a digest under the salt of the prefix cache, which only the client and its workers have, new every hour",
        gain="which chats of one client begin alike, within an hour; no text")  # fmt: skip
async def test_guessed(stage: Stage, honest: Stage, wire: HttpWire) -> None:
    """The right guess, under everything that a gateway has for a key; and two clients of one caller."""
    client, other = (stage.client(wire, honest.token) for _ in range(2))
    async with LyingWorker(stage):
        for each, text in ((client, stage.prompt), (client, stage.prompt), (client, "?"), (other, stage.prompt)):
            await each.chat(text)
    asked = [request.headers for request in wire.requests if request.url.path == SEALED_PATH]
    first, again, another, elsewhere = (headers[AFFINITY] for headers in asked)
    assert first == again
    assert len({first, another, elsewhere}) == 3

    beginning = beginning_of({"messages": [{"role": "user", "content": stage.prompt}]})
    assert beginning is not None
    known = ("", "0" * 32, honest.token, *(value for headers in asked for value in headers.values()))
    assert first not in {affinity_of(salt, asked[0][POOL], MODEL, beginning) for salt in known}
