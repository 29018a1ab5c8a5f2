"""A malicious caller: what it says to an honest gateway, outside of the seal."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from hostile.adversary import AsgiWire, inner
from hostile.attacks import Verdict, attack
from lacre import problems
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from parts.keys import MODEL
from parts.stage import Stage

OUTER_HEADERS = {
    "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": "default", "lacre-model": MODEL, "lacre-action": "chat",
    "lacre-max-tokens": "512", "lacre-shape": "none",
}  # fmt: skip


async def refused_outside(wire: AsgiWire, verdict: Verdict, content: bytes, headers: list[tuple[str, str]]) -> None:
    request = httpx2.Request("POST", "http://gateway.test/v1/sealed", headers=headers, content=content)
    verdict.said(problems.Problem.type_in(await (await wire.handle_async_request(request)).aread()))


def headers_of(honest: Stage, **changes: str) -> list[tuple[str, str]]:
    return [*(OUTER_HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}).items(),
            ("authorization", f"Bearer {honest.token}")]  # fmt: skip


@attack("send a request in the clear", "client",
        "there is one media type, and no other endpoint", problems.UNSUPPORTED_MEDIA_TYPE)  # fmt: skip
@pytest.mark.parametrize("media_type", ["application/json", "message/ohttp-req", "message/bhttp"])
async def test_clear(honest: Stage, wire: AsgiWire, verdict: Verdict, media_type: str) -> None:
    await refused_outside(wire, verdict, b'{"messages":[]}', headers_of(honest, content_type=media_type))


@attack("say one thing to policy and another to the worker, by an outer header given twice", "client",
        "each outer header appears once", problems.INVALID_HEADERS)  # fmt: skip
@pytest.mark.parametrize("name", ["lacre-model", "lacre-pool", "lacre-action", "lacre-max-tokens", "lacre-shape"])
async def test_twice(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, name: str) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, [*headers_of(honest), (name, OUTER_HEADERS[name])])
    assert worker.calls == 0


@attack("send the gateway a request that is cut short", "client",
        "the gateway walks the chunks to the final one", problems.INVALID_REQUEST)  # fmt: skip
async def test_cut_outside(stage: Stage, honest: Stage, wire: AsgiWire, fabric: Any, verdict: Verdict) -> None:
    sealed, *_ = seal_request(stage.keys.pool.config, bytes(20_000))
    await refused_outside(wire, verdict, sealed[:8000], headers_of(honest))
    assert not fabric.works


@attack("send the gateway more than 7 MiB", "client", "a limit, counted while it is read", problems.TOO_LARGE)
async def test_too_large(honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    headers = [pair for pair in headers_of(honest) if pair[0] != "content-length"]
    await refused_outside(wire, verdict, bytes(MAX_SEALED_REQUEST + 1), headers)


@attack("use an action that policy does not grant", "client", "Cedar policies, default deny", problems.PATH_NOT_ALLOWED)
async def test_policy(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner(path="/admin")))
    await refused_outside(wire, verdict, sealed, headers_of(honest, lacre_action="http"))
    assert worker.calls == 0


@attack("seal to an older generation's key", "client", "the gateway knows each key's `not_after`", problems.UNKNOWN_KEY)
@pytest.mark.parametrize("taken_out", [True, False])
async def test_old_generation(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, taken_out: bool) -> None:
    worker = await stage.worker()
    older = stage.pools(PrivateKey.generate(7)) if taken_out else stage.pools(stage.keys.pool, lives=-1)
    stage.bucket = stage.document(2, pools=older)
    await honest.gateway.feed.refresh()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    await refused_outside(wire, verdict, sealed, headers_of(honest))
    assert worker.calls == 0
