"""What is tried again before anything of an answer came, how often, and after how long; and what is not."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.asgi import App
from lacre.errors import NetworkError, TruncatedStream
from lacre.exchange import retry
from lacre.exchange.retry import ENDURANCE, ENDURANCE_RESUMING, FIRST, LONGEST, MOST, NO_GATEWAY_PAUSE, PATIENCE, TRIES, Retries
from lacre.transport.sealed import TimedOut, Unreachable
from parts.relay import MANIFEST, SEALED, Relay, connect, served

GONE, CUT = httpx2.ConnectError("gone"), httpx2.ReadError("cut")
SILENT = {"model": "tiny", "messages": ["x"]}


class ByAProxy:
    """What nginx says where no gateway answers: nothing of ours."""

    status = 502

    def body(self) -> bytes:
        return b"<html><h1>502 Bad Gateway</h1></html>"

    def __str__(self) -> str:
        return "a proxy's own words"


def first(*answers: Any, to: str = SEALED) -> Any:
    """These, one after the other, to requests of one path; then the relay's own."""
    left = list(answers)

    def respond(request: httpx2.Request) -> httpx2.Response | None:
        if request.url.path != to or not left:
            return None
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return served(answer.status, answer.body(), {"retry-after": "0"})

    return respond


@pytest.mark.parametrize(
    "fault",
    [problems.BUSY, problems.RATE_LIMITED, problems.WORKER_LOST, ByAProxy(), GONE, CUT],
    ids=str,
)  # fmt: skip
def test_once_more(relay: Relay, fault: Any) -> None:
    relay.respond = first(fault)
    with connect(relay) as client:
        answer = client.chat("x")
    assert (answer.text, answer.attempts) == ("one two three", 2)
    sent = [request.content for request in relay.sealed]
    assert len(sent) == len(set(sent)) == 2  # sealed afresh


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (problems.FORBIDDEN, lacre.Forbidden),
        (problems.REPLAYED, lacre.RefusedError),
        (problems.INTERNAL, lacre.Unavailable),
        (httpx2.ReadTimeout("late"), TimedOut),
    ],
    ids=str,
)
def test_not_again(relay: Relay, fault: Any, error: type[lacre.LacreError]) -> None:
    relay.respond = first(fault)
    with connect(relay) as client, pytest.raises(error):
        client.chat("x")
    assert len(relay.sealed) == 1


@pytest.mark.parametrize("faults", [
    (problems.WORKER_LOST, problems.WORKER_LOST),
    (problems.UNCLAIMED, problems.WORKER_LOST),
    (problems.WORKER_LOST, problems.BUSY, problems.UNCLAIMED),
], ids=lambda faults: "-".join(fault.slug for fault in faults))  # fmt: skip
def test_what_two_workers_were_lost_by_goes_to_no_third(relay: Relay, faults: tuple[problems.Problem, ...]) -> None:
    relay.respond = first(*faults)
    with connect(relay, retries=9) as client:
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]})
    assert len(relay.sealed) == len(faults)
    assert (answer.status_code, answer.extensions["lacre"].lost) == (502, 2)
    assert answer.headers["x-should-retry"] == "false"  # the word that OpenAI's clients obey


@pytest.mark.parametrize(
    ("fault", "status", "sent"),
    [
        (problems.UNCLAIMED, 200, 2),
        (problems.WORKER_LOST, 502, 1),
        (CUT, None, 1),
        (GONE, 200, 2),  # it certainly did not run
    ],
    ids=str,
)
def test_what_may_have_an_effect_never_runs_twice(relay: Relay, fault: Any, status: int | None, sent: int) -> None:
    relay.respond = first(fault)
    with connect(relay) as client:
        try:
            assert client.post("/v1/orders", json=SILENT).status_code == status
        except Unreachable:
            assert status is None
    assert len(relay.sealed) == sent


@pytest.mark.parametrize(("retries", "sent"), [(0, 1), (1, 2), (None, 4)])
def test_as_often_as_asked(relay: Relay, retries: int | None, sent: int) -> None:
    """A caller that names no number has more tries where nothing ran, and every one of them is told."""
    relay.respond = first(*[problems.BUSY] * 3)
    with connect(relay, retries=retries) as client, nullcontext() if retries is None else pytest.raises(lacre.Unavailable):
        assert client.chat("x").attempts == 4
    assert len(relay.sealed) == sent


class Waiting:
    """A gateway whose workers are away for so long, by a clock that the client's waits alone move on."""

    def __init__(self, seconds: float, problem: problems.Problem = problems.NO_WORKER) -> None:
        self.now = 0.0
        self.sent = 0
        self.seconds = seconds
        self.problem = problem
        self.retries = Retries.of(None, repeatable=False, endurance=ENDURANCE, clock=lambda: self.now)

    def answered(self) -> bool:
        """Whether the call came through before its client gave it up."""
        while True:
            self.sent += 1
            if self.now >= self.seconds:
                return True
            if (pause := self.retries.after_refusal(self.problem, 2.0)) is None:
                return False
            self.now += pause


@pytest.mark.parametrize("problem", [problems.NO_WORKER, problems.BUSY, problems.AUDIT_UNAVAILABLE], ids=str)
def test_what_is_away_for_a_while_is_waited_for(problem: problems.Problem) -> None:
    assert Waiting(12.0, problem).answered()
    gone = Waiting(1e9, problem)
    assert not gone.answered()
    assert 1 + TRIES < gone.sent <= 1 + MOST
    assert gone.now < ENDURANCE + 2.0 + LONGEST


def test_a_slow_refusal_is_followed_as_often_as_anything() -> None:
    """A gateway that looks for a worker for ten seconds, and asks for five more, leaves no time for a second try otherwise."""
    clock = itertools.count(0.0, 20.0)
    retries = Retries.of(None, repeatable=True, endurance=ENDURANCE_RESUMING, clock=lambda: next(clock))
    tries = [retries.after_refusal(problems.NO_WORKER, 5.0) is not None for _ in range(TRIES + 1)]
    assert tries == [True] * TRIES + [False]
    assert retries.after_refusal(problems.WORKER_LOST, None) is not None, "what may have run has tries of its own"


def test_a_limit_is_not_knocked_at() -> None:
    limited = Waiting(1e9, problems.RATE_LIMITED)
    assert not limited.answered()
    assert limited.sent == 1 + TRIES


def test_what_may_have_run_is_not_waited_for() -> None:
    """But a balancer has time to look for another gateway."""
    retries = Retries.of(None, repeatable=True, endurance=ENDURANCE, clock=lambda: 0.0)
    pauses = [retries.after_refusal(problems.NO_GATEWAY, None) for _ in range(TRIES + 2)]
    assert [(pause or 0.0) >= NO_GATEWAY_PAUSE for pause in pauses] == [True] * TRIES + [False] * 2
    never = Retries.of(None, repeatable=False, endurance=ENDURANCE, clock=lambda: 0.0)
    assert never.after_refusal(problems.WORKER_LOST, None) is None


def test_the_manifest_too(relay: Relay) -> None:
    relay.respond = first(GONE, to=MANIFEST)
    with connect(relay) as client:
        assert client.chat("x").attempts == 1


def test_what_a_proxy_says_is_not_taken_for_a_gateways_word(relay: Relay) -> None:
    relay.respond = first(ByAProxy())
    with connect(relay, retries=0) as client, pytest.raises(lacre.Unavailable) as caught:
        client.chat("x")
    assert caught.value.problem == problems.NO_GATEWAY.type
    assert "gateways are up" in caught.value.remedy


def test_how_long() -> None:
    """Whatever is not there now is asked again."""
    for problem in problems.BY_TYPE.values():
        if problem.status == 503:
            assert Retries(1, repeatable=False).after_refusal(problem, 0.0) is not None, problem
    retries = Retries(2, repeatable=True)
    assert 3 <= (retries.after_refusal(problems.BUSY, 3.0) or 0) <= 3 + FIRST
    assert retries.after_refusal(problems.BUSY, PATIENCE + 1) is None
    assert 0 <= (retries.after_failure(TruncatedStream("cut")) or 0) <= 2 * FIRST
    assert retries.after_failure(NetworkError("gone")) is None
    assert all(retry.delay(50) <= LONGEST for _ in range(20))
    assert len({retry.delay(3) for _ in range(20)}) > 1


def answering(headers: list[tuple[bytes, bytes]], body: bytes) -> App:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize("codings", [["gzip"], ["identity", "gzip"], ["", "br"], ["identity, gzip"], ["GZIP"]], ids=str)
def test_a_compressed_answer_is_not_inflated(codings: list[str]) -> None:
    headers = [(b"content-encoding", coding.encode()) for coding in codings]

    with connect(Relay(answering(headers, b"\x1f\x8b"))) as client, pytest.raises(lacre.InvalidMessage, match="compressed"):
        client.chat("x")


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        *((f"text/event-stream; charset={codec}", b"data: x\n\n") for codec in ("zlib", "rot13", "undefined")),
        ("text/event-stream; charset=unicode_escape", b'data: {"a":"\\ud800"}\n\n'),
        ("application/json", b"{}"),
        ("text/event-stream", b"data: " + b"x" * 2**20 + b"\n\n"),
    ],
    ids=["zlib", "rot13", "undefined", "unicode_escape", "no events", "one that is too large"],
)
def test_a_stream_that_is_none(media_type: str, body: bytes) -> None:
    """However a worker calls it: nothing but a typed error comes of it, and no codec of its choice runs."""

    app = answering([(b"content-type", media_type.encode())], body)
    with connect(Relay(app)) as client, pytest.raises(lacre.InvalidMessage):
        list(client.chat_stream("x"))
