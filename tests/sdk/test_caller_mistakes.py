"""What a program gets wrong is its own mistake, told by name before anything leaves it; and what it interrupts stays so."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

import lacre
import lacre.legacy
from lacre import direct, proxy
from lacre.chat.request import MAX_DEPTH, encode
from lacre.cli import app
from lacre.cli.chat import sampling
from lacre.client import fetch_manifest
from lacre.trust.chain import Trusted
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, connect, connect_async

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hi"}
LOOP: list[Any] = []
LOOP.append(LOOP)
DEEP: Any = "x"
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]

MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no messages": (None, {}, "messages must be a string or a list of messages, not None"),
    "bytes": (b"hi", {}, "messages must be a string, not bytes: decode it"),
    "a number": (3, {}, "messages must be a string or a list"),
    "one message": (HELLO, {}, "messages must be .* put it in a list"),
    "a message that is none": ([HELLO, lacre], {}, r"messages\[1\]: one message is a mapping"),
    "a message that is a string": (["hi"], {}, r"messages\[0\]"),
    "pairs": ([[("role", "user")]], {}, r"messages\[0\]"),
    "content of bytes": ([{"role": "user", "content": b"hi"}], {}, r"messages\[0\].content: bytes has no form in JSON"),
    "a set": ([{"role": "user", "content": [{"x": {1}}]}], {}, r"messages\[0\].content\[0\].x: set"),
    "an object": ([HELLO], {"tools": [object()]}, r"tools\[0\]: object"),
    "a name that is no string": ([HELLO], {"logit_bias": {5: 1}}, "logit_bias: names must be strings in JSON, and one is int"),
    "not a number": ("hi", {"temperature": float("nan")}, "temperature: nan"),
    "infinity": ("hi", {"top_p": float("inf")}, "top_p: inf"),
    "half an emoji": ([{"role": "user", "content": "x\ud83d"}], {}, r"messages\[0\].content: character 1 is half"),
    "half an emoji alone": ("\ud83d", {}, r"messages\[0\].content: character 0"),
    "half an emoji in a name": ([HELLO], {"extra_body": {"\ud83d": 1}}, "the body: character 0"),
    "a loop": ([{"role": "user", "content": LOOP}], {}, "nested over 200 deep, or contains itself"),
    "too deep": ("hi", {"metadata": DEEP}, "nested over 200 deep"),
    "a number of thousands of digits": ("hi", {"seed": 10**5000}, "seed: a whole number of over 1024 bits"),
    "no model": ("hi", {"model": ""}, "model is empty"),
    "a model that is a number": ("hi", {"model": 5}, "model must be a string, not int"),
    "a model of bytes": ("hi", {"model": b"tiny"}, "model must be a string"),
    "a time limit in words": ("hi", {"timeout": "3"}, "timeout must be a number of seconds"),
    "a negative time limit": ("hi", {"timeout": -1}, "timeout must be a number of seconds"),
    "no number for a time limit": ("hi", {"timeout": float("nan")}, "timeout must be a number of seconds"),
    "headers in a list": ("hi", {"extra_headers": [("a", "b")]}, "extra_headers must be a mapping of strings"),
    "a header of bytes": ("hi", {"extra_headers": {"a": b"b"}}, "extra_headers must be a mapping of strings"),
    "a header of two lines": ("hi", {"extra_headers": {"a": "b\r\nc: d"}}, "extra_headers: a header's name has"),
    "a header beyond ASCII": ("hi", {"extra_headers": {"a": "\u00e9"}}, "extra_headers: a header's name has"),
    "a query of numbers": ("hi", {"extra_query": {"a": 1}}, "extra_query must be a mapping of strings"),
    "half an emoji in a query": ("hi", {"extra_query": {"a": "\ud83d"}}, "extra_query: character 0"),
    "a body that is a list": ("hi", {"extra_body": ["a"]}, "extra_body must be a mapping, not list"),
    "a stream that is a word": ("hi", {"stream": "yes"}, "stream: chat and chat_stream set this themselves"),
    "a stream in the body": ("hi", {"extra_body": {"stream": 1}}, "stream: chat and chat_stream set this themselves"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "params", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_by_name_before_anything_is_sent(
    client: lacre.Client, relay: Relay, messages: Any, params: dict[str, Any], told: str
) -> None:
    other = connect_async(relay)
    for ask in (client.chat, client.chat_stream, other.chat_stream):  # at the call itself, not at the first piece
        with pytest.raises(lacre.UsageError, match=told) as caught:
            ask(messages, **params)
        assert type(caught.value) is lacre.UsageError
    with pytest.raises(lacre.UsageError, match=told):
        asyncio.run(other.chat(messages, **params))
    assert relay.requests == []


def test_half_an_emoji_in_a_request_of_httpx2s_own_is_not_told(client: lacre.Client, relay: Relay) -> None:
    with pytest.raises(lacre.UsageError) as caught:
        client.get("/v1/models", headers={"x-a": "s3cret\ud83d"})
    assert caught.value.__cause__ is None and "s3cret" not in str(caught.value)
    assert relay.requests == []


def test_the_other_method(client: lacre.Client, relay: Relay) -> None:
    with pytest.raises(lacre.UsageError, match="call chat_stream"):
        client.chat("hi", stream=True)
    with pytest.raises(lacre.UsageError, match="call chat for a whole answer"):
        client.chat_stream("hi", stream=False)
    assert relay.requests == []
    assert client.chat("hi", stream=False).text == client.chat_stream("hi", stream=True).reply().text


@pytest.mark.parametrize(
    "messages",
    [
        "hi", [HELLO], (HELLO,), iter([HELLO]), [MappingProxyType(HELLO)],
        [{**HELLO, "content": ({"type": "text", "text": "hi"},)}],
    ],
    ids=["text", "list", "tuple", "iterator", "another mapping", "a tuple inside"],
)  # fmt: skip
def test_what_is_taken(client: lacre.Client, app: ChatApp, messages: Any) -> None:
    client.chat(messages, model=None)
    [sent] = json.loads(app.bodies[0])["messages"]
    assert sent["role"] == "user"
    assert sent["content"] in ("hi", [{"type": "text", "text": "hi"}])


def test_what_is_written_is_what_was_given_then(client: lacre.Client, app: ChatApp) -> None:
    turns = [dict(HELLO)]
    stream = client.chat_stream(turns)
    turns[0]["content"] = "changed"
    turns.append(turns[0])
    list(stream)
    assert json.loads(app.bodies[0])["messages"] == [HELLO]


def test_a_reply_is_the_next_turns_message(client: lacre.Client, app: ChatApp) -> None:
    reply = client.chat([HELLO])
    client.chat([HELLO, reply.message, HELLO])
    assert json.loads(app.bodies[1])["messages"][1] == {"role": "assistant", "content": "one two three"}


@pytest.mark.parametrize("value", ["x", True, None, 0, -1.5, 2**64, [], {}, {"a": ["\u00e9\U0001f642", "\x00"]}])
def test_json_is_what_the_standard_library_writes(value: Any) -> None:
    assert json.loads(encode({"a": value})) == {"a": value}


class TestOptionsOfACall:
    def test_none_of_them_is_a_member_of_the_body(self, client: lacre.Client, app: ChatApp) -> None:
        options: dict[str, Any] = {"timeout": 9.0, "extra_headers": {"x-a": "b"}, "extra_query": {"c": "d"}}
        client.chat("hi", extra_body={"seed": 5}, **options)
        list(client.chat_stream("hi", extra_body={"seed": 5}, **options))
        for sent in map(json.loads, app.bodies):
            assert set(sent) - {"stream", "stream_options"} == {"messages", "model", "seed"}
        assert [scope["query_string"] for scope in app.scopes] == [b"c=d", b"c=d"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_time_limit_is_this_calls(self, relay: Relay, stream: bool) -> None:
        limits: list[dict[str, Any]] = [{"timeout": limit} for limit in (3, None, httpx2.Timeout(5), ...)] + [{}]
        with connect(relay, timeout=7) as client:
            for limit in limits:
                ask = (lambda **limit: client.chat_stream("hi", **limit).reply()) if stream else partial(client.chat, "hi")
                await asyncio.to_thread(ask, **limit)
        async with connect_async(relay, timeout=7) as other:
            for limit in limits:
                await (other.chat_stream("hi", **limit).reply() if stream else other.chat("hi", **limit))
        assert [request.extensions["timeout"]["read"] for request in relay.sealed] == [3, None, 5, 7, 7] * 2

    def test_headers_that_say_who_asks_stay_out(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("hi", extra_headers={"authorization": "Bearer other", "x-user": "ada", "content-type": "text/plain"})
        inner = dict(relay.opened[0].request.headers)
        assert inner["content-type"] == "application/json"
        assert not {"authorization", "x-user"} & set(inner)
        assert relay.requests[-1].headers["authorization"] == "Bearer t0ken"


class TestALimitOfARequest:
    """A socket with a limit of 0 seconds does not wait at all: the gateway would look unreachable."""

    @pytest.mark.parametrize("limit", [0, 0.0, -1, httpx2.Timeout(5, read=0), httpx2.Timeout(5, connect=0), 1e308, "9", True])
    def test_one_that_no_answer_can_keep(self, client: lacre.Client, relay: Relay, limit: Any) -> None:
        for ask in (partial(client.post, CHAT, json={"messages": [HELLO]}), partial(client.chat, "hi")):
            with pytest.raises(lacre.UsageError, match="timeout must be a number of seconds above 0"):
                ask(timeout=limit)
        assert not relay.requests

    @pytest.mark.parametrize("limit", [0.5, 5, None, httpx2.Timeout(5, pool=0)])
    def test_one_that_can_be_kept(self, client: lacre.Client, limit: Any) -> None:
        assert client.post(CHAT, json={"messages": [HELLO]}, timeout=limit).status_code == 200


@pytest.mark.parametrize("make", [lacre.Client, lacre.legacy.Client, lacre.AsyncClient, lacre.legacy.AsyncClient])
@pytest.mark.parametrize("use", [lambda client: client.models(), lambda client: client.get("/v1/models")])
async def test_a_closed_client(relay: Relay, make: Callable[..., Any], use: Callable[[Any], Any]) -> None:
    """Nothing was fetched before, so each use would connect."""
    later = "Async" in make.__name__
    client = make(relay.url, token="t", memory=lacre.VersionMemory(), transport=(AsyncWire if later else Wire)(relay))
    if later:
        await client.aclose()
    else:
        client.close()
    with pytest.raises(lacre.UsageError, match="this client is closed"):
        _ = await use(client) if later else use(client)


# Absent is None alone: what is empty never stands for what the environment says, wherever it is given.

CLIENTS = [lacre.Client, lacre.AsyncClient, lacre.OpenAI, lacre.AsyncOpenAI, lacre.legacy.Client, lacre.legacy.AsyncClient]
BLANK = ["", " ", "\n\t"]
PIN, HERE = "A" * 43, "http://127.0.0.1:9"
DIRECT = [direct.Client, direct.AsyncClient]


SERVICE = pytest.mark.usefixtures("service")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, relay: Relay, tmp_path: Path) -> None:
    """The environment of a service that has an identity of its own."""
    for name, value in {"LACRE_URL": relay.url, "LACRE_TOKEN": "of-the-service", "XDG_STATE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("make", CLIENTS, ids=lambda make: f"{make.__module__}.{make.__name__}")
@SERVICE
class TestEveryClient:
    @pytest.mark.parametrize("blank", BLANK)
    @pytest.mark.parametrize("name", ["token", "url", "pool", "verify", "proxy", "shape"])
    def test_an_empty_argument_is_a_mistake(self, make: Callable[..., Any], name: str, blank: str) -> None:
        with pytest.raises(lacre.UsageError, match=name):
            make(**{name: blank})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("token", b"t"), ("token", 0), ("token", False), ("token", ()), ("url", 3), ("url", b"lacre://x"), ("pool", 3),
            ("memory", 0), ("memory", ""), ("memory", lacre.VersionMemory), ("dpop", ""), ("dpop", "key.pem"), ("kem", ()),
            ("kem", ""), ("kem", None), ("retries", -1), ("retries", True), ("retries", "2"), ("resume", None), ("resume", 1.5),
            ("verify", None), ("verify", 0), ("transport", ""), ("transport", 0), ("transport", object()),
            ("proxy", 0), ("keep_identifying_fields", ""),
        ],
    )  # fmt: skip
    def test_another_kind_is_a_mistake_that_names_the_argument(
        self, make: Callable[..., Any], name: str, value: object
    ) -> None:
        with pytest.raises(lacre.UsageError, match=rf"^{name}\b"):
            make(**{name: value})

    def test_none_is_absent(self, make: Callable[..., Any]) -> None:
        make(None, token=None, memory=None, dpop=None, proxy=None, retries=None)


@SERVICE
@pytest.mark.parametrize("seconds", [-1.0, 0, float("nan"), float("inf"), "9", True])
@pytest.mark.parametrize("make", [lacre.Client, lacre.AsyncClient, lacre.legacy.Client, lacre.legacy.AsyncClient])
def test_a_time_limit(make: Callable[..., Any], seconds: object) -> None:
    with pytest.raises(lacre.UsageError, match=r"^timeout"):
        make(timeout=seconds)


@SERVICE
class TestTheCallersToken:
    @pytest.mark.parametrize("given", [*BLANK, None, b"", b"t", 3, []])
    def test_a_callable_that_has_none(self, relay: Relay, given: Any) -> None:
        async def ask() -> Any:
            return given

        for token, told in ((lambda: given, "token"), (ask, "AsyncClient")):
            with lacre.Client(token=token, transport=Wire(relay)) as client, pytest.raises(lacre.UsageError, match=told):
                client.chat("x")
        with pytest.raises(lacre.UsageError, match="token"):
            asyncio.run(lacre.AsyncClient(token=ask, transport=AsyncWire(relay)).chat("x"))
        assert relay.sealed == []

    def test_none_is_the_services_own(self, relay: Relay) -> None:
        with lacre.Client(transport=Wire(relay)) as client:
            client.chat("x")
        assert [request.headers["authorization"] for request in relay.sealed] == ["Bearer of-the-service"]


CREDENTIALS = {"token_url": "https://issuer.example/token", "client_id": "a", "client_secret": "s3cret"}
DOORS: list[tuple[str, Callable[[str], Any]]] = [
    ("url", fetch_manifest),
    *(("url", partial(make, key=PIN)) for make in DIRECT),
    *(("key", lambda blank, make=make: make(HERE, key=blank)) for make in DIRECT),
    *(("token", lambda blank, make=make: make(HERE, key=PIN, token=blank)) for make in DIRECT),
    ("key", partial(proxy.ProxyAccess.on, 80)),
    ("name", lambda blank: proxy.ProxyAccess.on(80, "k" * 40, names=[blank])),
    ("origin", lambda blank: proxy.ProxyAccess.on(80, "k" * 40, origins=[blank])),
    *((name, lambda blank, name=name: lacre.ClientCredentials(**{**CREDENTIALS, name: blank}))
      for name in (*CREDENTIALS, "scope", "audience")),
]  # fmt: skip


@SERVICE
class TestElsewhere:
    def test_a_memory_that_counts_as_false_is_used(self, relay: Relay, tmp_path: Path) -> None:
        class Counted(lacre.VersionMemory):
            asked = 0

            def __len__(self) -> int:
                return 0

            def update(self, decide: Any) -> Trusted:
                self.asked += 1
                return super().update(decide)

        memory = Counted()
        with lacre.Client(memory=memory, transport=Wire(relay)) as client:
            client.chat("x")
        assert memory.asked == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("blank", BLANK)
    @pytest.mark.parametrize(("name", "call"), DOORS)
    def test_other_doors(self, name: str, call: Callable[[str], Any], blank: str) -> None:
        with pytest.raises(lacre.UsageError, match=name) as caught:
            call(blank)
        assert "s3cret" not in str(caught.value)

    @pytest.mark.parametrize("command", [["chat", "hi"], ["ask", "hi"], ["status"], ["proxy"], ["manifest", "show"]])
    def test_an_option_of_the_command(self, command: list[str]) -> None:
        result = CliRunner().invoke(app, [*command, "--url", ""])
        assert isinstance(result.exception, lacre.UsageError)
        assert "LACRE_URL is used only if" in str(result.exception)

    def test_an_option_that_is_empty_was_given_all_the_same(self) -> None:
        assert sampling("", 3, None) == {"max_tokens": 3, "model": ""}


@pytest.mark.parametrize("value", ["", None])
@pytest.mark.parametrize("variable", ["LACRE_URL", "LACRE_TOKEN", "LACRE_DPOP_KEY"])
@SERVICE
def test_a_variable_that_is_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, value)
    needed = pytest.raises(lacre.SettingsError, match=variable)
    with contextlib.nullcontext() if variable == "LACRE_DPOP_KEY" else needed:
        lacre.Client().close()


# Cancellation and Ctrl-C pass through the SDK unchanged, and so does what the caller's own function raises.


class Mine(Exception):
    """The caller's own."""


ENDS = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, Mine]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("place", ["token", "hook", "wire"])
@pytest.mark.parametrize("make", [lacre.Client, lacre.legacy.Client])
def test_it_passes(relay: Relay, kind: type[BaseException], place: str, make: Callable[..., Any]) -> None:
    def end(*_: object) -> Any:
        raise kind

    options: dict[str, Any] = {"token": "t", "memory": lacre.VersionMemory(), "transport": Wire(relay)}
    if place == "wire":
        relay.respond = end
    else:
        options |= {"token": end} if place == "token" else {"event_hooks": {"request": [end]}}
    with make(relay.url, **options) as client, pytest.raises(kind) as caught:
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello."}]})
    assert type(caught.value) is kind


@pytest.mark.parametrize("place", ["token", "wire", "stream"])
async def test_a_cancelled_call(relay: Relay, place: str) -> None:
    begun = asyncio.Event()

    async def wait(*_: object) -> Any:
        begun.set()
        await asyncio.sleep(60)

    class Waiting(httpx2.AsyncBaseTransport):
        handle_async_request = wait

    async with connect_async(relay, **({"transport": Waiting()} if place == "wire" else {"token": wait})) as client:
        stream = client.chat_stream("Hello.")
        call = asyncio.ensure_future(anext(stream) if place == "stream" else client.chat("Hello."))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with contextlib.suppress(RuntimeError):
            await stream.aclose()
        assert stream.usage is None and stream.text == ""  # and nothing replaces the cancellation


def test_a_program_interrupted_between_two_pieces(client: lacre.Client) -> None:
    with pytest.raises(KeyboardInterrupt):
        for piece in client.chat_stream("Hello."):
            assert piece
            raise KeyboardInterrupt
    assert client.chat("Hello.").text == "one two three"  # and the client works on
