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
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.asgi import Call, Receive, Send
from lacre.asgi.admission import DATE_WINDOW, REMEMBERED_FOR, ReplayMemory
from lacre.errors import TruncatedStream, UsageError
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.problems import Problem
from lacre.trust.manifest import Manifest
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import SMALLEST, UNIT
from lacre.wire.records import END
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_backend.node.node import NO_MANIFEST, Identity, Node
from lacre_fabric.work.contract import CLAIM_TTL, FabricUnavailable, QueueTimeout
from lacre_fabric.work.frames import FrameKind
from parts.bent import flipped
from parts.by_hand import CHAT, Answer, Sealed
from parts.echo_engine import EchoEngine
from parts.keys import MODEL, NOW, POOL
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage, running, until
from parts.told_app import JSON, STREAM, App


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def stage(app: App) -> AsyncIterator[Stage]:
    """A node that runs."""
    stage = Stage(now=NOW)
    async with running(stage.node(app)):
        yield stage


class TestAnswers:
    async def test_a_good_request(self, stage: Stage, app: App) -> None:
        sealed = stage.seal()
        answer = await stage.ask(sealed)
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
        assert call.features == {"tools"}
        assert call.fair == fair
        assert scope["client"] is None
        assert dict(scope["headers"])[b"lacre-cache-salt"] == b"ab"

    async def test_a_stream_has_records_of_one_size(self, stage: Stage, app: App) -> None:
        async def stream(receive: Receive, send: Send, call: Call) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            for word in ("a", "medium", "word" * 40):
                await send({"type": "http.response.body", "body": f"data: {word}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

        app.answer = stream
        answer = await stage.ask()
        assert answer.sizes() == [32 + 2 + UNIT + 16, *[2 + UNIT + 16] * 3, 1 + END + 16]
        _, content, _ = answer.opened()
        response = httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, content=content, request=httpx2.Request("GET", "x:")
        )
        assert [event.data for event in httpx2.EventSource(response)] == ["a", "medium", "word" * 40, "[DONE]"]

    async def test_without_padding_where_the_grant_says_so(self, stage: Stage) -> None:
        sealed = stage.seal({"lacre-shape": "none"})
        answer = await stage.ask(sealed, stage.grant(sealed.header, shape="none"))
        assert answer.opened()[1] == b'{"said":"aloud"}'
        assert sum(answer.sizes()) < 1000 < SMALLEST

    async def test_an_answer_larger_than_a_frame_may_be(self, stage: Stage, app: App) -> None:
        content = secrets.token_bytes(600_000)

        async def large(receive: Receive, send: Send, call: Call) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": JSON})
            await send({"type": "http.response.body", "body": content})

        app.answer = large
        for shape in ("pad", "none"):
            sealed = stage.seal({"lacre-shape": shape})
            answer = await stage.ask(sealed, stage.grant(sealed.header, shape=shape))
            assert max(answer.sizes()) < 17_000
            assert answer.opened()[1] == content

    async def test_two_at_once(self, stage: Stage) -> None:
        answers = await asyncio.gather(*(stage.ask(stage.seal(content=b"%d" % number)) for number in range(6)))
        assert [answer.opened()[1] for answer in answers] == [b"%d" % number for number in range(6)]

    async def test_with_the_real_api(self, app: App) -> None:
        engine = EchoEngine(name=MODEL, n_ctx=512)
        stage = Stage(now=NOW)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "sea"}], "max_tokens": 9, "stream": True}
        async with running(stage.node(create_app([engine]))):
            answer = await stage.ask(stage.seal(content=json.dumps(body).encode()))
        _, content, trailers = answer.opened()
        assert content.count(b"chat.completion.chunk") == 5 and b"data: [DONE]" in content
        receipt = stage.receipt(trailers[TRAILER])
        assert (receipt.completion_tokens, receipt.model) == (3, engine.model.digest)
        engine.close()


class TestGrants:
    """Whatever is wrong with a grant, nothing is opened and no app is called."""

    @pytest.mark.parametrize(
        "members",
        [
            {"exp": NOW},
            {"exp": NOW - 1},
            {"iat": NOW + 61},
            {"pool": "other"},
            {"model": "other"},
            {"enc": b64u(bytes(32))},
            {"shape": "paced"},
        ],
        ids=str,
    )
    async def test_members(self, stage: Stage, app: App, members: dict[str, Any]) -> None:
        sealed = stage.seal()
        answer = await stage.ask(sealed, stage.grant(sealed.header, **members))
        assert answer.problem == problems.INVALID_GRANT.type
        assert not app.calls

    async def test_by_another_key(self, stage: Stage, app: App) -> None:
        sealed = stage.seal()
        answer = await stage.ask(sealed, stage.grant(sealed.header, Ed25519PrivateKey.generate()))
        assert (answer.problem, app.calls) == (problems.INVALID_GRANT.type, [])

    @pytest.mark.parametrize("grant", ["", "a.b.c", "x" * 100_000])
    async def test_what_is_no_grant(self, stage: Stage, app: App, grant: str) -> None:
        sealed = stage.seal()
        dispatch = await stage.dispatch(sealed, grant or " ")
        frames = [frame async for frame in dispatch.frames()]
        assert (Answer(frames, sealed.opener).problem, app.calls) == (problems.INVALID_GRANT.type, [])

    async def test_a_receipt_is_no_grant(self, stage: Stage, app: App) -> None:
        """Signed by the very key that signs grants, and of another type."""
        sealed = stage.seal()
        members = json.loads('{"enc":"a","model":"m","prompt_tokens":1,"cached_tokens":0,"completion_tokens":1}')
        forged = Receipt(**members, start=1.0, end=1.0, final=True).sign(stage.keys.gateway)
        assert ((await stage.ask(sealed, forged)).problem, app.calls) == (problems.INVALID_GRANT.type, [])

    async def test_of_another_request(self, stage: Stage, app: App) -> None:
        first, second = stage.seal(), stage.seal()
        assert (await stage.ask(second, stage.grant(first.header))).problem == problems.INVALID_GRANT.type
        assert not app.calls

    async def test_for_a_model_that_the_queue_does_not_name(self, stage: Stage, app: App) -> None:
        """The fabric put it into another model's queue."""
        sealed = stage.seal()
        assert (await stage.ask(sealed, stage.grant(sealed.header, model="big"))).problem == problems.INVALID_GRANT.type

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
        altered = sealed._replace(body=bend(sealed.body))
        answer = await stage.ask(altered)
        assert (answer.problem, app.calls) == (problem.type, [])

    async def test_to_a_key_that_is_not_here(self, stage: Stage, app: App) -> None:
        answer = await stage.ask(stage.seal(key=PrivateKey.generate(7)))
        assert (answer.problem, app.calls) == (problems.UNKNOWN_KEY.type, [])

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
        answer = await stage.ask(stage.seal(key=PrivateKey.generate(2)))
        assert (answer.problem, app.calls, looks) == (problems.UNKNOWN_KEY.type, [], [1])

    async def test_something_that_is_no_http(self, stage: Stage, app: App) -> None:
        body, header, opener = seal_request(stage.held[1].config, b"\x07 not BHTTP")
        assert (await stage.ask(Sealed(body, header, opener))).problem == problems.INVALID_REQUEST.type
        assert not app.calls


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


class TestReplay:
    async def silence(self, stage: Stage, sealed: Sealed) -> None:
        """A loser ends without a word: not one frame comes for it."""
        with pytest.raises(QueueTimeout):
            await stage.ask(sealed)

    async def test_at_the_same_node(self, stage: Stage, app: App) -> None:
        sealed = stage.seal()
        assert (await stage.ask(sealed)).problem is None
        stage.hub.claims.clear()  # the fabric forgot: the node's own memory is what is left
        await self.silence(stage, sealed)
        assert len(app.calls) == 1

    async def test_at_another_node_of_the_pool(self, app: App) -> None:
        stage = Stage(now=NOW)
        sealed = stage.seal()
        async with running(stage.node(app)):
            assert (await stage.ask(sealed)).problem is None
        async with running(stage.node(app)):
            await self.silence(stage, sealed)
        assert len(app.calls) == 1

    async def test_after_the_window_the_date_refuses_it(self, app: App) -> None:
        """A fabric that forgets, and a node that starts anew, gain at most what lies inside the date's window."""
        stage = Stage(now=NOW)
        sealed = stage.seal()
        async with running(stage.node(app)):
            assert (await stage.ask(sealed)).problem is None
        stage.hub.claims.clear()
        stage.now += DATE_WINDOW + 1
        async with running(stage.node(app)):
            head, _, _ = (await stage.ask(sealed)).opened()
        assert (head.status, len(app.calls)) == (400, 1)

    def test_memory_holds_as_long_as_a_claim(self) -> None:
        seen = ReplayMemory()
        assert min(CLAIM_TTL, REMEMBERED_FOR) > 2 * DATE_WINDOW
        assert seen.add(b"a", 0.0) and not seen.add(b"a", CLAIM_TTL - 1)
        assert seen.add(b"a", CLAIM_TTL)

    def test_memory_that_is_full_forgets_nothing(self) -> None:
        seen = ReplayMemory(limit=2)
        assert seen.add(b"a", 0.0) and seen.add(b"b", 1.0)
        assert not seen.add(b"c", 2.0) and not seen.add(b"a", 2.0)
        assert seen.add(b"c", CLAIM_TTL)


class TestInside:
    """What differs from the grant is refused inside the seal, with a receipt for nothing, and padded like any answer."""

    def check(self, stage: Stage, answer: Answer, status: int) -> bytes:
        head, content, trailers = answer.opened()
        receipt = stage.receipt(trailers[TRAILER])
        assert head.status == status
        assert (receipt.final, receipt.prompt_tokens, receipt.completion_tokens) == (True, 0, 0)
        assert [frame.kind for frame in answer.frames] == [FrameKind.DATA, FrameKind.USAGE]
        assert sum(answer.sizes()) == 32 + 1 + SMALLEST + 16
        return content

    @pytest.mark.parametrize("seconds", [DATE_WINDOW + 1, -DATE_WINDOW - 1, 86400 * 365])
    async def test_date(self, stage: Stage, app: App, seconds: float) -> None:
        date = email.utils.formatdate(NOW + seconds, usegmt=True)
        head, content, _ = (await stage.ask(stage.seal({"date": date}))).opened()
        assert (head.status, Problem.type_in(content)) == (400, problems.DATE.type)
        assert dict(head.headers)["date"] == email.utils.formatdate(NOW, usegmt=True)
        assert not app.calls

    @pytest.mark.parametrize("date", [None, "", "yesterday", "Thu, 99 Foo 2026 00:00:00 GMT", "0"])
    async def test_what_is_no_date(self, stage: Stage, app: App, date: str | None) -> None:
        content = self.check(stage, await stage.ask(stage.seal({"date": date})), 400)
        assert Problem.type_in(content) == problems.DATE.type
        assert not app.calls

    @pytest.mark.parametrize("seconds", [DATE_WINDOW - 1, 1 - DATE_WINDOW])
    async def test_a_date_inside_the_window(self, stage: Stage, seconds: float) -> None:
        date = email.utils.formatdate(NOW + seconds, usegmt=True)
        assert (await stage.ask(stage.seal({"date": date}))).opened()[0].status == 200

    @pytest.mark.parametrize(
        ("sealed", "param"),
        [
            ({"headers": {"lacre-pool": "other"}}, "pool"),
            ({"headers": {"lacre-model": "big"}}, "model"),
            ({"headers": {"lacre-action": "embed"}}, "action"),
            ({"headers": {"lacre-max-tokens": "10"}}, "max_tokens"),
            ({"headers": {"lacre-shape": "none"}}, "shape"),
            ({"path": "/v1/completions"}, "action"),
            ({"path": "/admin"}, "action"),
            ({"authority": "metadata.internal"}, "authority"),
            ({"scheme": "http"}, "authority"),
        ],
    )
    async def test_what_differs_from_the_grant(self, stage: Stage, app: App, sealed: dict[str, Any], param: str) -> None:
        content = self.check(stage, await stage.ask(stage.seal(**sealed)), 403)
        error = json.loads(content)["error"]
        assert (error["code"], error["param"]) == ("grant_mismatch", param)
        assert not app.calls

    async def test_copies_may_be_left_out(self, stage: Stage) -> None:
        names = ("pool", "model", "action", "max-tokens", "shape")
        answer = await stage.ask(stage.seal({f"lacre-{name}": None for name in names}))
        assert answer.opened()[0].status == 200

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
        async with aclosing(dispatch.frames()) as frames:
            async for _ in frames:
                await until(lambda: len(dispatch.receipts) > 1)
                first, *_, last = map(stage.receipt, dispatch.receipts)
                break
        assert (first.completion_tokens, last.completion_tokens) == (0, 2)
        assert not last.final
        assert last.enc == b64u(sealed.header.digest)


class TestAppsThatFail:
    async def gone(self, receive: Receive, send: Send, call: Call) -> None:
        await receive()
        call.usage.completion_tokens = 1
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})

    async def raises(self, receive: Receive, send: Send, call: Call) -> None:
        await self.gone(receive, send, call)
        raise ValueError("secret detail")

    async def silent(self, receive: Receive, send: Send, call: Call) -> None:
        await receive()

    async def headless(self, receive: Receive, send: Send, call: Call) -> None:
        await send({"type": "http.response.body", "body": b"x"})

    async def twice(self, receive: Receive, send: Send, call: Call) -> None:
        await App().echo(receive, send, call)
        await send({"type": "http.response.body", "body": b"more"})

    async def odd_header(self, receive: Receive, send: Send, call: Call) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x y", b"\n")]})
        await send({"type": "http.response.body", "body": b"x"})

    @pytest.mark.parametrize("how", ["gone", "raises", "silent", "headless", "twice", "odd_header"])
    @pytest.mark.parametrize("shape", ["pad", "none"])
    async def test_is_never_passed_off_as_whole(self, stage: Stage, app: App, how: str, shape: str) -> None:
        app.answer = getattr(self, how)
        sealed = stage.seal({"lacre-shape": shape})
        answer = await stage.ask(sealed, stage.grant(sealed.header, shape=shape))
        assert answer.problem == problems.INTERNAL.type
        with pytest.raises(TruncatedStream):
            answer.opened()
        assert b"secret" not in b"".join(frame.payload for frame in answer.frames)
        app.answer = app.echo
        assert (await stage.ask()).opened()[0].status == 200  # its slot is free, and the next one is served


class TestCancelling:
    async def test_a_gateway_that_withdraws_frees_the_slot(self, stage: Stage, app: App) -> None:
        app.answer = app.slowly
        dispatch = await stage.dispatch(stage.seal())
        async with aclosing(dispatch.frames()) as frames:
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
        async with aclosing(dispatch.frames()) as frames:
            await anext(frames)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await node.drain(0.1)
            last = [frame async for frame in frames][-1]
        assert (last.kind, last.payload.decode()) == (FrameKind.ERROR, problems.WORKER_LOST.type)  # told, not left to find out
        assert not stage.hub.outbound
        assert stage.hub.gateway().workers(POOL, MODEL) == 0


class Together:
    """An app around another one: how many calls were under way at once, at most."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.now = self.most = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self._app(scope, receive, send)
        finally:
            self.now -= 1


class TestSequences:
    """A request of `n` choices is `n` sequences at the engine: the node (of two slots) pulls accordingly."""

    @pytest.mark.parametrize(("choices", "together"), [(1, 2), (2, 1), (8, 1)])
    async def test_a_burst_is_pulled_by_what_it_weighs(self, app: App, choices: int, together: int) -> None:
        stage, engine = Stage(now=NOW), EchoEngine(name=MODEL, delay=0.01)
        stage.queue_limit = 20.0
        counted = Together(create_app([engine]))
        body = {"model": MODEL, "n": choices, "max_tokens": 4, "messages": [{"role": "user", "content": "four"}]}
        async with running(stage.node(counted, slots=2, repeatable=REPEATABLE, weighs=WEIGHED)):
            answers = await asyncio.gather(*(stage.ask(*self.sealed(stage, body)) for _ in range(6)))
        assert [answer.opened()[0].status for answer in answers] == [200] * 6
        assert counted.most == together
        engine.close()

    async def test_a_request_that_the_app_refuses_holds_nothing(self, app: App) -> None:
        stage, engine = Stage(now=NOW), EchoEngine(name=MODEL)
        async with running(stage.node(create_app([engine]), repeatable=REPEATABLE, weighs=WEIGHED)):
            for body in ({"model": MODEL, "n": 10**6}, {"model": MODEL, "messages": []}, [], {"model": "other"}):
                answer = await stage.ask(*self.sealed(stage, body))
                assert answer.opened()[0].status >= 400
        engine.close()

    async def test_what_is_no_generation_counts_as_one_at_once(self, app: App) -> None:
        """Though the app says nothing of it."""
        stage = Stage(now=NOW)
        app.answer = app.slowly
        async with running(stage.node(app, slots=2, weighs=WEIGHED)):
            for _ in range(2):
                sealed = stage.seal({"lacre-action": "http"}, path="/predict")
                await stage.dispatch(sealed, stage.grant(sealed.header, action="http"))
            await until(lambda: len(app.calls) == 2)

    @staticmethod
    def sealed(stage: Stage, body: Any) -> tuple[Sealed, str]:
        sealed = stage.seal({"lacre-max-tokens": "32"}, content=json.dumps(body).encode())
        return sealed, stage.grant(sealed.header, max_tokens=32, max_prompt_tokens=1000)
