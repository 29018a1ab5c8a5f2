"""Every way to be refused before the first byte of an answer: the exact problem, and whether a worker ever saw the request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from lacre import problems
from lacre.errors import Detail
from lacre.exchange.model_paths import KNOWN
from lacre.problems import Problem, details
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre.wire.opening import PrivateKey
from lacre_fabric.work.contract import FabricBusy, FabricError, FabricUnavailable, NoQueue
from lacre_gateway.auth.throttle import RefusalThrottle
from lacre_gateway.http.headers import Fields
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.relay.failures import refusal_for
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.issuer import Issuer
from parts.stage import Stage
from parts.waiting import until

from .conftest import PutUp


def assert_problem(response: httpx2.Response, problem: Problem, **told: Detail) -> None:
    """told: members of the document beside its type, title and status."""
    found = details.read(response.content)
    assert (response.status_code, response.content) == (problem.status, problem.body(found))
    assert found == {**found, **told}
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert len(response.headers["lacre-request-id"]) == 32 and found["request_id"] == response.headers["lacre-request-id"]
    assert ("retry-after" in response.headers) == (problem.status in (429, 503))


OUTER: dict[str, tuple[str | None, ...]] = {
    "lacre_pool": (None, "", "a b", "x" * 129),
    "lacre_model": (None, "x" * 129),
    "lacre_action": (None, "", "Chat", "admin", "chat ,embed"),
    "lacre_max_tokens": (
        None, "0", "-1", "+1", "1.0", "1e3", "0x1", "", "01", "2147483648", "9" * 30, "1_0",
    ),
    "lacre_shape": (None, "", "paced", "None"),
}  # fmt: skip
MEDIA_TYPES = (
    None, "application/json", "message/ohttp-req", "message/ohttp-chunked-res", f"{MEDIA_TYPE_REQUEST}, text/html",
)  # fmt: skip
HEADERS: list[tuple[str, str | None, Problem, dict[str, Detail]]] = [
    *(
        (name, value, problems.INVALID_HEADERS, {"header": name.replace("_", "-")})
        for name, values in OUTER.items()
        for value in values
    ),
    *(("content_type", value, problems.UNSUPPORTED_MEDIA_TYPE, {}) for value in MEDIA_TYPES),
    ("content_encoding", "gzip", problems.UNSUPPORTED_MEDIA_TYPE, {}),
    ("lacre_pool", "another", problems.UNKNOWN_POOL, {"pools": ("default",)}),
    ("lacre_model", "smollm2-135M", problems.UNKNOWN_POOL, {"models": ("smollm2-135m",)}),
]


@pytest.mark.parametrize(("name", "value", "problem", "told"), HEADERS)
async def test_headers(
    name: str, value: str | None, problem: Problem, told: dict[str, Detail], stage: Stage, worker: FakeWorker,
    client: httpx2.AsyncClient,
) -> None:  # fmt: skip
    assert_problem(await stage.post(client, **{name: value}), problem, **told)
    assert worker.opened == []


@pytest.mark.parametrize("value", ["1", "2147483647"])
async def test_max_tokens_within_bounds(value: str, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, stage.issuer.token(scope="lacre:long"), lacre_max_tokens=value)
    assert (response.status_code, worker.grants[0].max_tokens) == (200, int(value))


LENGTHS = (b"", b"-1", b"0x10", b"1 0", b"9" * 20)


@pytest.mark.parametrize("length", LENGTHS)
async def test_length_that_is_none(length: bytes, client: httpx2.AsyncClient) -> None:
    """The listener refuses it before anybody reads the outer headers; these do not trust it either."""
    fields = [(b"content-type", MEDIA_TYPE_REQUEST.encode()), (b"content-length", length)]
    with pytest.raises(Refusal) as refused:
        Fields.collect(fields).check_media()
    assert refused.value.problem is problems.INVALID_HEADERS
    response = await client.post("/v1/sealed", content=b"x", headers=[*fields, (b"host", b"x")])
    assert (response.status_code, response.headers["connection"]) == (400, "close")


async def test_outer_header_twice(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    headers = [*stage.headers().items(), ("lacre-max-tokens", "1")]
    assert_problem(await client.post("/v1/sealed", content=stage.seal()[0], headers=headers), problems.INVALID_HEADERS)


HEADER = 7 + 1120  # of a sealed request: what names its key, and what the KEM made
BODIES: dict[str, tuple[Callable[[Stage], bytes], Problem]] = {
    "empty": (lambda _: b"", problems.INVALID_REQUEST),
    "text": (lambda _: b"hello", problems.INVALID_REQUEST),
    "JSON": (lambda _: b'{"messages": []}', problems.INVALID_REQUEST),
    "cut in its header": (lambda stage: stage.seal()[0][:3], problems.INVALID_REQUEST),
    "cut in what the KEM made": (lambda stage: stage.seal()[0][:600], problems.INVALID_REQUEST),
    "a header alone": (lambda stage: stage.seal()[0][:HEADER], problems.INVALID_REQUEST),
    "cut in a chunk's length": (lambda stage: stage.seal()[0][:HEADER] + b"\x00", problems.INVALID_REQUEST),
    "a chunk shorter than its tag": (
        lambda stage: stage.seal()[0][:HEADER] + b"\x01a\x00" + bytes(16), problems.INVALID_REQUEST,
    ),
    "a KEM that we do not have": (lambda stage: b"\x01\x00\x21" + stage.seal()[0][3:], problems.INVALID_REQUEST),
    "an AEAD that we do not have": (
        lambda stage: (body := stage.seal()[0])[:5] + b"\x00\x09" + body[7:], problems.INVALID_REQUEST,
    ),
    # As any byte changed in a chunk, it shows only when it is opened.
    "a final chunk that lost a byte": (lambda stage: stage.seal()[0][:-1], problems.INVALID_REQUEST),
    "an unknown key": (lambda stage: b"\x07" + stage.seal()[0][1:], problems.UNKNOWN_KEY),
    "a key past its time": (lambda stage: stage.seal(key=9)[0], problems.UNKNOWN_KEY),
    "a key of another KEM": (lambda stage: b"\x01" + stage.seal(key=2)[0][1:], problems.UNKNOWN_KEY),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_body(name: str, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    make, problem = BODIES[name]
    assert_problem(await stage.post(client, body=make(stage)), problem)
    assert worker.opened == []


async def test_a_key_younger_than_the_last_look(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """As with a client that another gateway told of it: the gateway looks for a new manifest."""
    stage.held = {5: PrivateKey.generate(5), **stage.held}
    stage.bucket = stage.document(2)
    body, _, opener = stage.seal(key=5)
    answer = await stage.post(client, body=body)
    assert opened(opener, answer.content) == b"".join(PIECES)


async def test_key_ids_that_nobody_has_do_not_load_the_fabric(stage: Stage, client: httpx2.AsyncClient) -> None:
    looks, fetch = 0, stage.gateway.feed._fetch

    async def counted() -> bytes | None:
        nonlocal looks
        looks += 1
        return await fetch()

    stage.gateway.feed._fetch = counted
    body, _, _ = stage.seal()
    answers = await asyncio.gather(*(stage.post(client, body=b"\x07" + body[1:]) for _ in range(20)))
    assert ({answer.status_code for answer in answers}, looks) == ({422}, 1)


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


@pytest.mark.parametrize("lives", [None, 0.05], ids=["none", "expired"])
async def test_no_manifest(lives: float | None, tmp_path: Path, issuer: Issuer) -> None:
    stage = Stage.with_gateway(tmp_path, issuer)
    await stage.gateway.revocations.start(stage.gateway.connected)
    if lives is not None:
        await stage.publish(stage.document(lives=lives))
        await asyncio.sleep(lives + 0.01)
    async with stage.http() as client:
        assert_problem(await stage.post(client), problems.NOT_READY)
    await stage.gateway.close()


async def test_nobody_to_ask(stage: Stage, client: httpx2.AsyncClient) -> None:
    """`NO_WORKER` is told apart from `BUSY`, which a request gets that waited in the queue or found it full."""
    assert_problem(await stage.post(client), problems.NO_WORKER)
    stage.hub.max_queue = 0
    stage.hub.worker("default", ["smollm2-135m"])
    assert_problem(await stage.post(client), problems.BUSY)
    stage.gateway.fabric = None
    assert_problem(await stage.post(client), problems.UNAVAILABLE)


@pytest.mark.parametrize(
    ("failed", "problem"),
    [
        (NoQueue("none"), problems.NO_WORKER),
        (FabricUnavailable("away"), problems.UNAVAILABLE),
        (FabricBusy("full"), problems.UNAVAILABLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_is_in_no_queue_counts_as_without_a_worker(failed: FabricError, problem: problems.Problem) -> None:
    """A client of a route sends a request to another pool after `NO_WORKER`."""
    assert refusal_for(failed).problem is problem


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
        await until(lambda: len(worker.opened) == 2)
        assert_problem(await impatient.post(client), problems.RATE_LIMITED, **AT_ONCE)  # a third of alice's
        running.append(asyncio.create_task(impatient.post(client, bob)))
        await until(lambda: len(worker.opened) == 3)
        fourth = await impatient.post(client, bob)  # of all
        assert_problem(fourth, problems.OVERLOADED, limit="requests_in_flight", scope="gateway")
        hold.set()
        assert [(await task).status_code for task in running] == [200, 200, 200]
        assert (await impatient.post(client)).status_code == 200


class Upload:
    """A body, piece by piece. sent: bytes that were asked for."""

    def __init__(self, pieces: Iterator[bytes], pause: float = 0) -> None:
        self.sent, self._pieces, self._pause = 0, pieces, pause

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            self.sent += len(piece)
            yield piece
            await asyncio.sleep(self._pause)


async def test_slow_body(impatient: Stage) -> None:
    body = impatient.seal()[0]
    trickle = Upload((bytes([byte]) for byte in body), 0.05)
    async with impatient.http() as client:
        assert_problem(await client.post("/v1/sealed", content=trickle, headers=impatient.headers()), problems.SLOW_BODY)
    assert trickle.sent < len(body), "the gateway waited for all of it"
    assert impatient.gateway.limits.running == 0


@pytest.mark.parametrize("length", [str(MAX_SEALED_REQUEST + 1), None])
async def test_too_large(length: str | None, stage: Stage, client: httpx2.AsyncClient) -> None:
    """Whatever it says of its length. One that is announced is refused before it is read."""
    announced = length == str(MAX_SEALED_REQUEST + 1)
    header = [] if announced else [stage.seal()[0]]  # which can be read
    body = Upload(iter([*header, *[bytes(2**18)] * 200]))
    response = await client.post("/v1/sealed", content=body, headers=stage.headers(content_length=length))
    assert_problem(response, problems.TOO_LARGE)
    # What is read, and what is read to be dropped before the close.
    assert body.sent <= (MAX_SEALED_REQUEST + 2**21 if announced else 2 * MAX_SEALED_REQUEST + 2**20)


async def test_audit_that_cannot_be_written(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """No record, no service: not one byte of the answer leaves."""
    await stage.gateway.audit.close()
    assert_problem(await stage.post(client), problems.AUDIT_UNAVAILABLE)
    assert worker.opened == []  # and no worker works for nobody
    assert "audit" in stage.gateway.missing()


FROM_WORKERS = [
    *((each.type, each) for each in (
        problems.INVALID_REQUEST, problems.INVALID_GRANT, problems.UNKNOWN_KEY, problems.REPLAYED, problems.BUSY,
        problems.UNCLAIMED, problems.WORKER_LOST,
    )),
    (problems.INVALID_TOKEN.type, problems.WORKER_LOST),  # not for a worker to say
    ("<script>", problems.WORKER_LOST),
    ("\xff", problems.WORKER_LOST),
]  # fmt: skip


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


PATHS = (
    "/", "/v1", "/v1/sealed/", "/V1/sealed", "/docs", "/openapi.json", "/redoc", "/v1/chat/completions", "/%20",
)  # fmt: skip
WRONG_METHODS = [("GET", "/v1/sealed"), ("PUT", "/v1/sealed"), ("POST", "/v1/manifest"), ("DELETE", "/healthz")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_such_resource(path: str, method: str, client: httpx2.AsyncClient) -> None:
    known = ("/healthz", "/readyz", "/v1/manifest", "/v1/me/usage", "/v1/sealed")
    assert_problem(await client.request(method, path), problems.NOT_FOUND, paths=known)


@pytest.mark.parametrize(("method", "path"), WRONG_METHODS)
async def test_wrong_method(method: str, path: str, client: httpx2.AsyncClient) -> None:
    response = await client.request(method, path)
    allow = ("POST",) if path == "/v1/sealed" else ("GET", "HEAD")
    assert_problem(response, problems.METHOD_NOT_ALLOWED, methods=allow)
    assert sorted(response.headers["allow"].split(", ")) == sorted(allow)


async def test_a_problem_says_nothing_else(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, lacre_pool="canary")
    assert set(json.loads(response.content)) == {"type", "title", "status", "pools", "request_id"}
    assert "canary" not in response.text + str(response.headers)


# How often a caller with a valid token may be refused, and what is told of the requests beyond that


ALICE = ("issuer", "alice")


def refused(throttle: RefusalThrottle, subject: object, address: str) -> float | None:
    """Seconds to wait; None where it is let through."""
    try:
        throttle.check(subject, address)  # type: ignore[arg-type]
    except Refusal as refusal:
        assert refusal.problem is problems.RATE_LIMITED
        return refusal.retry_after
    return None


def test_of_one_caller_and_of_one_address() -> None:
    now, told = [600.0], list[int]()
    throttle = RefusalThrottle(3, 5, lambda: now[0])
    throttle.report = told.append
    for _ in range(3):
        assert refused(throttle, ALICE, "192.0.2.1") is None
        throttle.refused(ALICE, "192.0.2.1")
    now[0] = 615.0
    assert refused(throttle, ALICE, "192.0.2.9") == 45.0
    assert refused(throttle, "bob", "192.0.2.1") is None
    for _ in range(2):
        throttle.refused("bob", "192.0.2.1")
    assert refused(throttle, "carol", "192.0.2.1") == 45.0
    assert refused(throttle, "carol", "192.0.2.2") is None
    now[0] = 660.0
    assert refused(throttle, ALICE, "192.0.2.1") is None
    assert told == [2]


def test_an_ipv6_household_is_one_address() -> None:
    throttle = RefusalThrottle(100, 2, lambda: 0.0)
    for number in range(2):
        throttle.refused(number, f"2001:db8::{number}")
    assert refused(throttle, "x", "2001:db8::ffff") is not None
    assert refused(throttle, "x", "2001:db8:0:1::1") is None


@pytest.mark.parametrize("count", [0, 3])
def test_memory_is_of_one_minute_and_what_was_not_told_is_told_at_the_end(count: int) -> None:
    now, told = [0.0], list[int]()
    throttle = RefusalThrottle(1, 10**6, lambda: now[0])
    throttle.report = told.append
    for number in range(1000):
        throttle.refused(number, "192.0.2.1")
    now[0] = 60.0
    assert refused(throttle, 1, "192.0.2.1") is None
    assert not throttle._counts
    throttle.refused(ALICE, "a")
    for _ in range(count):
        assert refused(throttle, ALICE, "a")
    throttle.close()
    throttle.close()
    assert told == [count] * bool(count)
