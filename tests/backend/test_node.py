"""The node between a fabric in memory and an ASGI app: what it takes, what it refuses and how, and what it signs."""

from __future__ import annotations

import asyncio
import email.utils
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import httpx2
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.asgi import Call, Receive, Send
from lacre.asgi.admission import DATE_WINDOW, REMEMBERED_FOR, ReplayMemory
from lacre.errors import AppLost, TruncatedStream, UsageError
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.problems import Problem
from lacre.trust.manifest import Manifest
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import SMALLEST, UNIT
from lacre.wire.records import END
from lacre_backend.node.node import NO_MANIFEST, Identity, Node
from lacre_fabric.work.contract import CLAIM_TTL, FabricUnavailable, QueueTimeout
from lacre_fabric.work.frames import FrameKind
from parts.bent import flipped
from parts.by_hand import CHAT, Answer, Sealed
from parts.frames import frames_of
from parts.keys import MODEL, NOW, POOL
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage, running, until
from parts.told_app import JSON, STREAM, App


@pytest.fixture
def app() -> App:
    return App()


HEAD: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": STREAM}


def piece(content: bytes = b"data: x\n\n", *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def sends(*messages: dict[str, Any] | Exception) -> Any:
    """An answer of these messages; it raises where an exception stands."""

    async def answer(receive: Receive, send: Send, call: Call) -> None:
        await receive()
        for message in messages:
            if isinstance(message, Exception):
                raise message
            await send(message)

    return answer


@pytest.fixture
async def stage(app: App) -> AsyncIterator[Stage]:
    """A node that runs."""
    stage = Stage(now=NOW)
    async with running(stage.node(app)):
        yield stage


class TestAnswers:
    async def test_a_good_request(self, stage: Stage) -> None:
        answer = await stage.ask()
        head, content, trailers = answer.opened()
        assert (head.status, content) == (200, b'{"said":"aloud"}')
        assert trailers.keys() == {TRAILER}
        assert [frame.kind for frame in answer.frames] == [FrameKind.DATA, FrameKind.USAGE]
        assert {frame.attempt for frame in answer.frames} == {answer.frames[0].attempt}

    async def test_what_the_app_is_told(self, stage: Stage, app: App) -> None:
        sealed = stage.seal({"lacre-cache-salt": "ab"})
        fair = ("T" * 22, "C" * 22)
        await stage.ask(sealed, stage.grant(sealed.header, features=("tools",), fair=fair))
        [call], [scope] = app.calls, app.scopes
        assert (call.model, call.action, call.max_tokens, call.max_prompt_tokens) == (MODEL, "chat", 9, 100)
        assert (call.features, call.fair) == ({"tools"}, fair)
        assert scope["client"] is None
        assert dict(scope["headers"])[b"lacre-cache-salt"] == b"ab"

    async def test_a_stream_has_records_of_one_size(self, stage: Stage, app: App) -> None:
        words = ["a", "medium", "word" * 40, "[DONE]"]
        app.answer = sends(HEAD, *(piece(f"data: {word}\n\n".encode(), more=word != "[DONE]") for word in words))
        answer = await stage.ask()
        assert answer.sizes() == [32 + 2 + UNIT + 16, *[2 + UNIT + 16] * 3, 1 + END + 16]
        _, content, _ = answer.opened()
        response = httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, content=content, request=httpx2.Request("GET", "x:")
        )
        assert [event.data for event in httpx2.EventSource(response)] == words

    async def test_without_padding_where_the_grant_says_so(self, stage: Stage) -> None:
        sealed = stage.seal({"lacre-shape": "none"})
        answer = await stage.ask(sealed, stage.grant(sealed.header, shape="none"))
        assert answer.opened()[1] == b'{"said":"aloud"}'
        assert sum(answer.sizes()) < 1000 < SMALLEST

    async def test_an_answer_larger_than_a_frame_may_be(self, stage: Stage, app: App) -> None:
        content = secrets.token_bytes(600_000)
        app.answer = sends({**HEAD, "headers": JSON}, piece(content, more=False))
        for shape in ("pad", "none"):
            sealed = stage.seal({"lacre-shape": shape})
            answer = await stage.ask(sealed, stage.grant(sealed.header, shape=shape))
            assert max(answer.sizes()) < 17_000
            assert answer.opened()[1] == content


async def refused(stage: Stage, app: App, problem: Problem, sealed: Sealed, grant: str | None = None) -> None:
    """Without a call of the app."""
    assert ((await stage.ask(sealed, grant)).problem, app.calls) == (problem.type, [])


# Signed by the very key that signs grants, and of another type.
RECEIPT = Receipt("a", "m", prompt_tokens=1, cached_tokens=0, completion_tokens=1, start=1.0, end=1.0, final=True)


class TestGrants:
    """Whatever is wrong with a grant, nothing is opened and no app is called."""

    @pytest.mark.parametrize(
        "members",
        [
            {"exp": NOW},
            {"exp": NOW - 1},
            {"iat": NOW + 61},
            {"pool": "other"},
            {"model": "other"},  # the fabric put it into another model's queue
            {"enc": b64u(bytes(32))},  # of another request
            {"shape": "paced"},
            {"key": Ed25519PrivateKey.generate()},
        ],
        ids=" ".join,
    )
    async def test_members(self, stage: Stage, app: App, members: dict[str, Any]) -> None:
        sealed = stage.seal()
        await refused(stage, app, problems.INVALID_GRANT, sealed, stage.grant(sealed.header, **members))

    @pytest.mark.parametrize("grant", [" ", "a.b.c", "x" * 100_000, "a receipt"])
    async def test_what_is_no_grant(self, stage: Stage, app: App, grant: str) -> None:
        grant = RECEIPT.sign(stage.keys.gateway) if grant == "a receipt" else grant
        await refused(stage, app, problems.INVALID_GRANT, stage.seal(), grant)

    async def test_nothing_is_pulled_before_there_is_a_manifest(self, app: App) -> None:
        stage = Stage(now=NOW)
        there, manifest = asyncio.Event(), Manifest("test", 1, NOW, NOW + 3600, raw_public_key(stage.keys.gateway), {})

        def current() -> Manifest:
            if not there.is_set():
                raise UsageError("no manifest yet")
            return manifest

        identity = Identity(POOL, lambda: stage.held, stage.keys.receipts, current)
        node = Node(stage.hub.worker(POOL, [MODEL]), app, identity, clock=lambda: stage.now)
        running = asyncio.create_task(node.run())
        asking = asyncio.create_task(stage.ask())
        await asyncio.sleep(NO_MANIFEST)
        assert len(stage.hub.queue) == 1
        there.set()
        assert (await asking).opened()[0].status == 200
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def test_by_an_expired_manifest(self, app: App) -> None:
        stage = Stage(now=NOW)
        expiring = stage.manifest(lives=10)
        async with running(stage.node(app, manifest=lambda: expiring)):
            assert (await stage.ask()).problem is None
            stage.now += 10
            assert (await stage.ask()).problem == problems.INVALID_GRANT.type


class TestSealing:
    @pytest.mark.parametrize(
        ("bend", "problem"),
        [
            (lambda body: body[:-1], problems.INVALID_REQUEST),
            (flipped, problems.INVALID_REQUEST),
            (lambda body: body + b"\0", problems.INVALID_REQUEST),
            (lambda body: body[:100], problems.INVALID_REQUEST),
            (lambda body: b"\x02" + body[1:], problems.INVALID_GRANT),  # its digest is another one then
        ],
    )
    async def test_altered_on_the_way(self, stage: Stage, app: App, bend: Callable[[bytes], bytes], problem: Problem) -> None:
        sealed = stage.seal()
        await refused(stage, app, problem, sealed._replace(body=bend(sealed.body)))

    async def test_something_that_is_no_http(self, stage: Stage, app: App) -> None:
        await refused(stage, app, problems.INVALID_REQUEST, Sealed(*seal_request(stage.held[1].config, b"\x07 not BHTTP")))

    async def test_to_a_key_that_is_not_here(self, stage: Stage, app: App) -> None:
        await refused(stage, app, problems.UNKNOWN_KEY, stage.seal(key=PrivateKey.generate(7)))

    async def test_a_key_that_came_since_the_last_look(self, stage: Stage) -> None:
        """A client learned of it before this worker did."""
        new = PrivateKey.generate(2)

        def look() -> bool:
            stage.held = {**stage.held, 2: new}
            return True

        stage.look_for_keys = look
        assert (await stage.ask(stage.seal(key=new))).opened()[0].status == 200

    async def test_a_look_that_brings_another_key_is_the_only_one(self, stage: Stage, app: App) -> None:
        looks: list[int] = []
        stage.look_for_keys = lambda: looks.append(1) is None
        await refused(stage, app, problems.UNKNOWN_KEY, stage.seal(key=PrivateKey.generate(2)))
        assert looks == [1]


class Leaderless(MemoryFabric):
    """Its claims cannot be reached for so many tries. tries: how often they were asked."""

    def __init__(self, away: int) -> None:
        super().__init__()
        self.away, self.tries = away, 0

    async def claim(self, digest: bytes, attempt: str) -> bool:
        self.tries += 1
        if self.tries <= self.away:
            raise FabricUnavailable("the claims have no leader")
        return await super().claim(digest, attempt)


class TestClaimsThatAreAway:
    """A worker that cannot claim is well: nobody takes it for lost, and nothing runs twice."""

    async def test_they_are_asked_again(self, app: App) -> None:
        stage = Stage(hub := Leaderless(2), now=NOW)
        async with running(stage.node(app)):
            assert (await stage.ask(stage.seal())).problem is None
        assert (hub.tries, len(app.calls)) == (3, 1)

    async def test_in_the_end_the_caller_is_told_to_come_again(self, app: App) -> None:
        stage = Stage(Leaderless(10**6), now=NOW)
        async with running(stage.node(app, claim_patience=0.1)):
            assert (await stage.ask(stage.seal())).problem == problems.BUSY.type


async def test_a_replay_at_the_same_node_ends_without_a_word(stage: Stage, app: App) -> None:
    sealed = stage.seal()
    assert (await stage.ask(sealed)).problem is None
    stage.hub.claims.clear()  # the fabric forgot: the node's own memory is what is left
    with pytest.raises(QueueTimeout):
        await stage.ask(sealed)
    assert len(app.calls) == 1


def test_memory_holds_as_long_as_a_claim_and_forgets_nothing_when_full() -> None:
    seen = ReplayMemory(limit=2)
    assert min(CLAIM_TTL, REMEMBERED_FOR) > 2 * DATE_WINDOW
    assert seen.add(b"a", 0.0) and seen.add(b"b", 1.0)
    assert not seen.add(b"c", 2.0) and not seen.add(b"a", CLAIM_TTL - 1)
    assert seen.add(b"c", CLAIM_TTL)


def dated(seconds: float) -> str:
    return email.utils.formatdate(NOW + seconds, usegmt=True)


class TestInside:
    """What differs from the grant is refused inside the seal, with a receipt for nothing, and padded like any answer."""

    def check(self, stage: Stage, answer: Answer, status: int) -> tuple[Any, bytes]:
        head, content, trailers = answer.opened()
        receipt = stage.receipt(trailers[TRAILER])
        assert head.status == status
        assert (receipt.final, receipt.prompt_tokens, receipt.completion_tokens) == (True, 0, 0)
        assert [frame.kind for frame in answer.frames] == [FrameKind.DATA, FrameKind.USAGE]
        assert sum(answer.sizes()) == 32 + 1 + SMALLEST + 16
        return dict(head.headers), content

    @pytest.mark.parametrize(
        "date",
        [None, "", "yesterday", "Thu, 99 Foo 2026 00:00:00 GMT", "0",
         *map(dated, (DATE_WINDOW + 1, -DATE_WINDOW - 1, 86400 * 365))],
    )  # fmt: skip
    async def test_date(self, stage: Stage, app: App, date: str | None) -> None:
        headers, content = self.check(stage, await stage.ask(stage.seal({"date": date})), 400)
        assert (Problem.type_in(content), headers["date"], app.calls) == (problems.DATE.type, dated(0), [])

    @pytest.mark.parametrize(
        "headers",
        [
            {"date": dated(DATE_WINDOW - 1)},
            {"date": dated(1 - DATE_WINDOW)},
            {f"lacre-{name}": None for name in ("pool", "model", "action", "max-tokens", "shape")},
            {"lacre-max-tokens": None, "lacre-most-tokens": "100000"},
        ],
        ids=["ahead", "behind", "no copies", "a lowered default"],
    )
    async def test_what_may_differ(self, stage: Stage, headers: dict[str, str | None]) -> None:
        assert (await stage.ask(stage.seal(headers))).opened()[0].status == 200

    @pytest.mark.parametrize(
        ("sealed", "param"),
        [
        ({"headers": {"lacre-pool": "other"}}, "pool"), ({"headers": {"lacre-model": "big"}}, "model"),
        ({"headers": {"lacre-action": "embed"}}, "action"), ({"headers": {"lacre-max-tokens": "10"}}, "max_tokens"),
        ({"headers": {"lacre-max-tokens": None, "lacre-most-tokens": "3"}}, "max_tokens"),
        ({"headers": {"lacre-max-tokens": None, "lacre-most-tokens": "many"}}, "max_tokens"),
        ({"headers": {"lacre-shape": "none"}}, "shape"), ({"path": "/v1/completions"}, "action"),
        ({"path": "/admin"}, "action"), ({"authority": "metadata.internal"}, "authority"),
        ({"scheme": "http"}, "authority"),
        ],
    )  # fmt: skip
    async def test_what_differs_from_the_grant(self, stage: Stage, app: App, sealed: dict[str, Any], param: str) -> None:
        _, content = self.check(stage, await stage.ask(stage.seal(**sealed)), 403)
        error = json.loads(content)["error"]
        assert (error["code"], error["param"], app.calls) == ("grant_mismatch", param, [])

    @pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
    async def test_http_is_no_way_around_the_actions(self, stage: Stage, app: App, path: str) -> None:
        sealed = stage.seal({"lacre-action": "http"}, path=path)
        self.check(stage, await stage.ask(sealed, stage.grant(sealed.header, action="http")), 403)
        other = stage.seal({"lacre-action": "http"}, path="/predict")
        assert (await stage.ask(other, stage.grant(other.header, action="http"))).opened()[0].status == 200
        assert len(app.calls) == 1


class TestReceipts:
    async def test_the_client_and_the_gateway_get_the_same_one(self, stage: Stage) -> None:
        sealed = stage.seal()
        answer = await stage.ask(sealed)
        _, _, trailers = answer.opened()
        assert answer.frames[-1].payload.decode() == trailers[TRAILER]
        receipt = stage.receipt(trailers[TRAILER])
        assert receipt == Receipt(b64u(sealed.header.digest), "sha256:" + "7" * 64, 11, 4, 3, NOW, NOW, True)

    async def test_beats_carry_what_was_used_so_far(self, stage: Stage, app: App) -> None:
        app.answer = app.slowly
        sealed = stage.seal()
        dispatch = await stage.dispatch(sealed)
        async with aclosing(frames_of(dispatch)) as frames:
            async for _ in frames:
                await until(lambda: len(dispatch.receipts) > 1)
                first, *_, last = (stage.receipt(frame.payload) for frame in dispatch.receipts)
                break
        assert (first.completion_tokens, last.completion_tokens) == (0, 2)
        assert not last.final
        assert last.enc == b64u(sealed.header.digest)


class TestAppsThatFail:
    @pytest.mark.parametrize(
        "messages",
        [
            pytest.param([HEAD, piece()], id="gone"),
            pytest.param([HEAD, piece(), ValueError("secret detail")], id="raises"),
            pytest.param([], id="silent"),
            pytest.param([piece(more=False)], id="headless"),
            pytest.param([HEAD, piece(more=False), piece(b"more", more=False)], id="twice"),
            pytest.param([{**HEAD, "headers": [(b"x y", b"\n")]}, piece(more=False)], id="odd header"),
        ],
    )
    @pytest.mark.parametrize("shape", ["pad", "none"])
    async def test_is_never_passed_off_as_whole(self, stage: Stage, app: App, messages: list[Any], shape: str) -> None:
        app.answer = sends(*messages)
        sealed = stage.seal({"lacre-shape": shape})
        answer = await stage.ask(sealed, stage.grant(sealed.header, shape=shape))
        assert answer.problem == problems.INTERNAL.type
        with pytest.raises(TruncatedStream):
            answer.opened()
        assert b"secret" not in b"".join(frame.payload for frame in answer.frames)
        app.answer = app.echo
        assert (await stage.ask()).opened()[0].status == 200  # its slot is free, and the next one is served

    @pytest.mark.parametrize("before", [[], [HEAD, piece()]], ids=["at once", "in its answer"])
    @pytest.mark.parametrize(("begun", "problem"), [(True, problems.WORKER_LOST), (False, problems.BUSY)])
    async def test_whose_own_process_is_lost_are_told_from_a_fault(
        self, stage: Stage, app: App, before: list[Any], begun: bool, problem: Problem
    ) -> None:
        """The client counts it as a lost worker only if this request may have been the cause."""
        app.answer = sends(*before, AppLost("the engine has ended", begun=begun))
        answer = await stage.ask()
        assert answer.problem == problem.type
        app.answer = app.echo
        assert (await stage.ask()).opened()[0].status == 200

    async def test_logs_ids_and_places_and_nothing_of_the_prompt(
        self, stage: Stage, app: App, capfd: pytest.CaptureFixture[str]
    ) -> None:
        async def breaks(receive: Receive, send: Send, call: Call) -> None:
            raise KeyError((await receive())["body"])

        structlog.reset_defaults()  # its renderer shows local variables; the node must not give it any
        app.answer = breaks
        answer = await stage.ask(stage.seal(content=b"canary-7f3a91"), request_id="of-this-request")
        assert answer.problem == problems.INTERNAL.type
        logged = "".join(capfd.readouterr())
        assert "of-this-request" in logged
        assert "KeyError" in logged
        assert "canary" not in logged


class TestCancelling:
    async def test_a_gateway_that_withdraws_frees_the_slot(self, stage: Stage, app: App) -> None:
        app.answer = app.slowly
        dispatch = await stage.dispatch(stage.seal())
        async with aclosing(frames_of(dispatch)) as frames:
            async for _ in frames:
                break
        await asyncio.wait_for(app.left.wait(), 10)
        assert dispatch.receipt is not None
        last = stage.receipt(dispatch.receipt)
        assert (last.completion_tokens, last.final) == (2, True)  # before its first beat: what was made is told all the same
        await until(lambda: not stage.hub.outbound)
        app.answer = app.echo
        assert (await stage.ask()).opened()[0].status == 200

    async def test_draining_cancels_what_takes_too_long(self, app: App) -> None:
        stage = Stage(now=NOW)
        app.answer = app.slowly
        node = stage.node(app)
        task = asyncio.create_task(node.run())
        dispatch = await stage.dispatch(stage.seal())
        async with aclosing(frames_of(dispatch)) as frames:
            await anext(frames)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await node.drain(0.1)
            last = [frame async for frame in frames][-1]
        assert (last.kind, last.payload.decode()) == (FrameKind.ERROR, problems.WORKER_LOST.type)  # told, not left to find out
        assert not stage.hub.outbound
        assert stage.hub.gateway().workers(POOL, MODEL) == 0
