"""Every way to be refused before the first byte of an answer: the exact problem, and whether a worker ever saw the request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from lacre import problems
from lacre.errors import Detail
from lacre.exchange.model_paths import KNOWN
from lacre.problems import Problem, details
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from parts.fake_worker import FakeWorker, Script
from parts.issuer import Issuer
from parts.stage import Stage

from .conftest import PutUp


def assert_problem(response: httpx2.Response, problem: Problem, **told: Detail) -> None:
    """told: members of the document beside its type, title and status."""
    found = details.read(response.content)
    assert (response.status_code, response.content) == (problem.status, problem.body(found))
    assert found == {**found, **told}
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert len(response.headers["lacre-request-id"]) == 32
    assert ("retry-after" in response.headers) == (problem.status in (429, 503))


HEADERS: list[tuple[str, str | None]] = [
    *((name, None) for name in ("lacre_pool", "lacre_model", "lacre_action", "lacre_max_tokens", "lacre_shape")),
    *(("lacre_max_tokens", value) for value in ("0", "-1", "+1", "1.0", "1e3", "0x1", "", "01", "2147483648", "9" * 30, "1_0")),
    *(("lacre_action", value) for value in ("", "Chat", "admin", "chat ,embed")),
    *(("lacre_shape", value) for value in ("", "paced", "None")),
    *(("lacre_pool", value) for value in ("", "a b", "x" * 129)),
    ("lacre_model", "x" * 129),
]


@pytest.mark.parametrize(("name", "value"), HEADERS)
async def test_outer_headers(
    name: str, value: str | None, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    header = name.replace("_", "-")
    assert_problem(await stage.post(client, **{name: value}), problems.INVALID_HEADERS, header=header)
    assert worker.opened == []


@pytest.mark.parametrize("value", ["1", "2147483647"])
async def test_max_tokens_within_bounds(value: str, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    headers = stage.headers(stage.issuer.token(scope="lacre:long"), lacre_max_tokens=value)
    response = await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)
    assert response.status_code == 200
    assert worker.grants[0].max_tokens == int(value)


async def test_outer_header_twice(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    headers = [*stage.headers().items(), ("lacre-max-tokens", "1")]
    assert_problem(await client.post("/v1/sealed", content=stage.seal()[0], headers=headers), problems.INVALID_HEADERS)


async def test_an_unknown_pool_names_the_pools(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, lacre_pool="another"), problems.UNKNOWN_POOL, pools=("default",))
    assert worker.opened == []


async def test_an_unknown_model_names_the_models(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    refused = await stage.post(client, lacre_model="smollm2-135M")
    assert_problem(refused, problems.UNKNOWN_POOL, models=("smollm2-135m",))
    assert worker.opened == []


@pytest.mark.parametrize(
    "media_type",
    [None, "application/json", "message/ohttp-req", "message/ohttp-chunked-res", f"{MEDIA_TYPE_REQUEST}, text/html"],
)
async def test_media_type(media_type: str | None, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, content_type=media_type), problems.UNSUPPORTED_MEDIA_TYPE)
    assert worker.opened == []


async def test_content_encoding(stage: Stage, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, content_encoding="gzip"), problems.UNSUPPORTED_MEDIA_TYPE)


def broken_bodies(stage: Stage) -> Iterator[bytes]:
    body, _, _ = stage.seal()
    yield b""
    yield b"hello"
    yield b'{"messages": []}'
    yield body[:3]
    yield body[:600]
    yield body[: 7 + 1120]
    yield body[: 7 + 1120] + b"\x00"
    yield body[: 7 + 1120] + b"\x01a\x00" + bytes(16)  # a chunk shorter than its tag
    yield b"\x01\x00\x21" + body[3:]  # a KEM that we do not have
    yield body[:5] + b"\x00\x09" + body[7:]  # an AEAD that we do not have


async def test_body_that_is_not_sealed(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    for body in broken_bodies(stage):
        assert_problem(await stage.post(client, body=body), problems.INVALID_REQUEST)
    assert worker.opened == []


async def test_body_that_only_a_worker_can_tell_from_a_whole_one(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """A final chunk that lost a byte, or any byte changed in a chunk, shows only when it is opened."""
    body, _, _ = stage.seal()
    assert_problem(await stage.post(client, body=body[:-1]), problems.INVALID_REQUEST)
    assert worker.opened == []


async def test_unknown_key_id(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    assert_problem(await stage.post(client, body=b"\x07" + body[1:]), problems.UNKNOWN_KEY)
    assert worker.opened == []


async def test_key_past_its_time(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, body=stage.seal(key=9)[0]), problems.UNKNOWN_KEY)


async def test_key_id_of_another_kem(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal(key=2)
    assert_problem(await stage.post(client, body=b"\x01" + body[1:]), problems.UNKNOWN_KEY)


async def test_replay(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    assert (await stage.post(client, body=body)).status_code == 200
    assert_problem(await stage.post(client, body=body), problems.REPLAYED)
    assert len(worker.opened) == 1
    # The first is settled beside the second, and may be recorded after it.
    assert sorted(str(entry.get("outcome")) for entry in await stage.trail(2)) == ["None", "None", "answered", "refused"]


async def test_policy(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, lacre_action="http"), problems.PATH_NOT_ALLOWED, paths=KNOWN)
    most = {"limit": "max_tokens", "scope": "policy", "unit": "tokens", "ceiling": 32768, "asked": 40000}
    assert_problem(await stage.post(client, lacre_max_tokens="40000"), problems.TOO_MANY_TOKENS, **most)
    assert worker.opened == []
    first, end, second, _ = await stage.trail(2)
    assert (first["decision"], first["policies"]) == ("deny", [])
    assert (end["outcome"], end["status"], end["unreceipted"]) == ("refused", 403, True)
    assert second["policies"] == ["output-ceiling"]


async def test_no_manifest(tmp_path: Path, issuer: Issuer) -> None:
    stage = Stage.with_gateway(tmp_path, issuer)
    await stage.gateway.revocations.start(stage.gateway.connected)
    async with stage.http() as client:
        assert_problem(await stage.post(client), problems.NOT_READY)
    await stage.gateway.close()


async def test_expired_manifest(tmp_path: Path, issuer: Issuer) -> None:
    stage = Stage.with_gateway(tmp_path, issuer)
    await stage.publish(stage.document(lives=0.05))
    await asyncio.sleep(0.06)
    async with stage.http() as client:
        assert_problem(await stage.post(client), problems.NOT_READY)
    await stage.gateway.close()


async def test_no_worker(stage: Stage, client: httpx2.AsyncClient) -> None:
    """Told apart from `BUSY`, which a request gets that waited in the queue."""
    assert_problem(await stage.post(client), problems.NO_WORKER)


async def test_not_connected(stage: Stage, client: httpx2.AsyncClient) -> None:
    stage.gateway.fabric = None
    assert_problem(await stage.post(client), problems.UNAVAILABLE)


async def test_queue_full(stage: Stage, client: httpx2.AsyncClient) -> None:
    stage.hub.max_queue = 0
    stage.hub.worker("default", ["smollm2-135m"])
    assert_problem(await stage.post(client), problems.BUSY)


@pytest.fixture
async def impatient(put_up: PutUp) -> Stage:
    limits = "queue_limit = 0.2\nbody_timeout = 0.3\nconcurrent_per_subject = 2\nrequests_in_flight = 3"
    return await put_up(limits=limits)


async def test_queue_limit(impatient: Stage) -> None:
    """A worker is there and never free: the request waits, is refused, and leaves the queue."""
    impatient.hub.worker("default", ["smollm2-135m"])
    async with impatient.http() as client:
        since = time.monotonic()
        assert_problem(await impatient.post(client), problems.BUSY)
        assert time.monotonic() - since >= 0.2
    assert not impatient.hub.queue
    assert (await impatient.trail())[1]["outcome"] == "refused"


AT_ONCE: dict[str, Detail] = {"limit": "concurrent_per_subject", "scope": "user", "ceiling": 2}


async def test_requests_at_once(impatient: Stage) -> None:
    hold = asyncio.Event()
    async with impatient.http() as client, impatient.fake_worker() as worker:
        worker.script = Script(before=hold.wait)
        bob = impatient.issuer.token(sub="bob")
        running = [asyncio.create_task(impatient.post(client)) for _ in range(2)]
        while len(worker.opened) < 2:
            await asyncio.sleep(0.01)
        assert_problem(await impatient.post(client), problems.RATE_LIMITED, **AT_ONCE)  # a third of alice's
        running.append(asyncio.create_task(impatient.post(client, authorization=f"Bearer {bob}")))
        while len(worker.opened) < 3:
            await asyncio.sleep(0.01)
        fourth = await impatient.post(client, authorization=f"Bearer {bob}")  # of all
        assert_problem(fourth, problems.OVERLOADED, limit="requests_in_flight", scope="gateway")
        hold.set()
        assert [(await task).status_code for task in running] == [200, 200, 200]
        assert (await impatient.post(client)).status_code == 200


async def test_slow_body(impatient: Stage) -> None:
    body, sent = impatient.seal()[0], 0

    async def trickle() -> AsyncIterator[bytes]:
        nonlocal sent
        for byte in body:
            sent += 1
            yield bytes([byte])
            await asyncio.sleep(0.05)

    async with impatient.http() as client:
        response = await client.post("/v1/sealed", content=trickle(), headers=impatient.headers())
    assert_problem(response, problems.SLOW_BODY)
    assert sent < len(body), "the gateway waited for all of it"
    assert impatient.gateway.limits.running == 0


async def test_too_large_by_content_length(stage: Stage, client: httpx2.AsyncClient) -> None:
    """Refused before it is read: the body that is announced never comes."""
    sent = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(16):
            sent.append(2**20)
            yield bytes(2**20)

    headers = stage.headers(content_length=str(MAX_SEALED_REQUEST + 1))
    assert_problem(await client.post("/v1/sealed", content=body(), headers=headers), problems.TOO_LARGE)
    assert sum(sent) <= MAX_SEALED_REQUEST + 2**21  # what lingers before the close is bounded too


@pytest.mark.parametrize("length", [None, "10"])
async def test_too_large_whatever_it_says(length: str | None, stage: Stage, client: httpx2.AsyncClient) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield stage.seal()[0]  # a header that can be read
        for _ in range(200):
            sent += 2**18
            yield bytes(2**18)

    headers = stage.headers(content_length=length)
    assert_problem(await client.post("/v1/sealed", content=body(), headers=headers), problems.TOO_LARGE)
    assert sent <= 2 * MAX_SEALED_REQUEST + 2**20  # what is read, and what is read to be dropped


@pytest.mark.parametrize("length", ["", "-1", "0x10", "1 0", "9" * 20])
async def test_content_length_that_is_none(length: str, stage: Stage, client: httpx2.AsyncClient) -> None:
    assert_problem(await stage.post(client, content_length=length), problems.INVALID_HEADERS, header="content-length")


async def test_audit_that_cannot_be_written(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """No record, no service: not one byte of the answer leaves."""
    await stage.gateway.audit.close()
    assert_problem(await stage.post(client), problems.AUDIT_UNAVAILABLE)
    assert worker.opened == []  # and no worker works for nobody
    assert "audit" in stage.gateway.missing()


FROM_WORKERS = [
    (problems.INVALID_REQUEST.type, problems.INVALID_REQUEST),
    (problems.INVALID_GRANT.type, problems.INVALID_GRANT),
    (problems.UNKNOWN_KEY.type, problems.UNKNOWN_KEY),
    (problems.REPLAYED.type, problems.REPLAYED),
    (problems.BUSY.type, problems.BUSY),
    (problems.UNCLAIMED.type, problems.UNCLAIMED),
    (problems.WORKER_LOST.type, problems.WORKER_LOST),
    (problems.INVALID_TOKEN.type, problems.WORKER_LOST),  # not for a worker to say
    ("<script>", problems.WORKER_LOST),
    ("\xff", problems.WORKER_LOST),
]


@pytest.mark.parametrize(("said", "problem"), FROM_WORKERS)
async def test_worker_refuses(
    said: str, problem: Problem, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    worker.script = Script(pieces=(), ending=f"error:{said}")
    assert_problem(await stage.post(client), problem)
    assert (await stage.trail())[1]["status"] == problem.status


async def test_worker_dies_before_its_answer(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    worker.script = Script(pieces=(), beats=({},), ending="silence")
    assert_problem(await stage.post(client), problems.WORKER_LOST)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/sealed/",
        "/v1//sealed",
        "/V1/sealed",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/v1/chat/completions",
        "/%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_such_resource(path: str, method: str, client: httpx2.AsyncClient) -> None:
    known = ("/healthz", "/readyz", "/v1/manifest", "/v1/sealed")
    assert_problem(await client.request(method, path), problems.NOT_FOUND, paths=known)


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("GET", "/v1/sealed", {"POST"}),
    ("PUT", "/v1/sealed", {"POST"}),
    ("POST", "/v1/manifest", {"GET", "HEAD"}),
    ("DELETE", "/healthz", {"GET", "HEAD"}),
])  # fmt: skip
async def test_wrong_method(method: str, path: str, allow: set[str], client: httpx2.AsyncClient) -> None:
    response = await client.request(method, path)
    assert_problem(response, problems.METHOD_NOT_ALLOWED, methods=tuple(sorted(allow)))
    assert set(response.headers["allow"].split(", ")) == allow


async def test_a_problem_says_nothing_else(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, lacre_pool="canary")
    assert set(json.loads(response.content)) == {"type", "title", "status", "pools"}
    assert "canary" not in response.text + str(response.headers)
