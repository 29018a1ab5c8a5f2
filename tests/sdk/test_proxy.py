"""`lacre proxy` as a process of its own, over real sockets: who gets in, what passes, what it says when something fails."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

import lacre
from lacre import problems
from lacre import proxy as proxying
from lacre_backend.api.app import create_app
from parts.bent import without
from parts.chat_app import reply
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay, connect_async, on_sealed, refusing, served
from parts.up import LACRE

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "the sea"}]}
STREAMED = {**BODY, "stream": True}
PAGE = "http://localhost:3000"
ASKED: Any = {**BODY, "max_tokens": 8}  # of the Messages API
PREFLIGHT = {"access-control-request-method": "POST"}


@dataclass
class Proxy:
    """Here and below, `{key}` and `{port}` in what is sent stand for the proxy's."""

    told: dict[str, Any]

    def filled(self, text: str) -> str:
        return text.replace("{key}", self.told["api_key"]).replace("{port}", str(httpx2.URL(self.told["base_url"]).port))

    def client(self, **headers: str | None) -> httpx2.Client:
        """headers: beside the key's; None for one that is not sent."""
        wanted = {"authorization": "Bearer {key}"} | headers
        sent = {name: self.filled(value) for name, value in wanted.items() if value is not None}
        return httpx2.Client(base_url=self.told["base_url"] + "/", headers=sent, timeout=60, trust_env=False)

    def ask(
        self, method: str = "POST", path: str = "chat/completions", body: Any = BODY, **headers: str | None
    ) -> httpx2.Response:
        with self.client(**headers) as client:
            return client.request(method, path, **({"content": body} if isinstance(body, bytes) else {"json": body}))


def outcome(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@contextmanager
def started(gateway: Gateway, home: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [*LACRE, "proxy", "--port", "0", *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=settings(gateway, home), stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def running(gateway: Gateway, home: Path, *options: str) -> Iterator[Proxy]:
    with started(gateway, home, "--json", *options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Proxy(json.loads(line))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=512)
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live
    engine.close()


@pytest.fixture(scope="module")
def proxy(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(gateway, tmp_path_factory.mktemp("home"), "--allow-origin", PAGE) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def honest(gateway: Gateway) -> Iterator[None]:
    gateway.relay.requests.clear()
    gateway.relay.opened.clear()
    yield
    gateway.relay.respond, gateway.relay.bend, gateway.before = lambda _request: None, list, None


class TestWhatPasses:
    def test_a_whole_answer(self, proxy: Proxy, gateway: Gateway) -> None:
        answer = proxy.ask(body={**BODY, "user": "jo@example.com"}, cookie="c00kie", traceparent="00-telling")
        assert answer.json()["choices"][0]["message"]["content"] == "the sea"
        assert "server" not in answer.headers
        [inside], [outside] = gateway.relay.opened, gateway.relay.sealed
        assert json.loads(inside.request.content) == BODY
        assert not {name for name, _value in inside.request.headers} & {"cookie", "traceparent", "authorization"}
        assert outside.headers["authorization"] == "Bearer t0ken"  # the proxy's own key goes nowhere
        assert b"the sea" not in outside.content and proxy.told["api_key"] not in str(outside.headers)

    def test_what_a_body_cannot_say(self, proxy: Proxy, gateway: Gateway) -> None:
        """Which model, and how much the answer may hold, of a path whose body nobody reads."""
        proxy.ask(path="predict", body=b"0123", **{"lacre-model": "tiny", "lacre-max-tokens": "99"})
        [outside] = gateway.relay.sealed
        assert (outside.headers["lacre-action"], outside.headers["lacre-model"]) == ("http", "tiny")
        assert outside.headers["lacre-max-tokens"] == "99"

    def test_pieces_pass_while_the_answer_is_still_sealed(self, proxy: Proxy, gateway: Gateway) -> None:
        """The gateway holds the later records back until the program has seen the first token."""
        seen, lines = threading.Event(), []

        async def before(i: int) -> None:
            if i == 4:
                assert await asyncio.to_thread(seen.wait, 30)

        gateway.before = before
        with proxy.client() as client, client.stream("POST", "chat/completions", json=STREAMED) as answer:
            for line in filter(None, answer.iter_lines()):
                lines.append(line)
                if '"content":"t"' in line.replace(" ", ""):
                    seen.set()
        assert seen.is_set() and lines[-1] == "data: [DONE]"
        assert answer.headers["x-accel-buffering"] == "no"

    def test_models_and_the_workers_error(self, proxy: Proxy) -> None:
        assert [model["id"] for model in proxy.ask("GET", "models").json()["data"]] == ["tiny"]
        assert proxy.ask("GET", "models/tiny?x=1").json()["id"] == "tiny"
        assert outcome(proxy.ask(body={**BODY, "model": "gone"})) == (404, "model_not_found")

    def test_a_gateways_refusal(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.respond = refusing(problems.RATE_LIMITED, retry_after="11")
        answer = proxy.ask()
        # Longer than `PATIENCE` of lacre.exchange.retry: the proxy leaves the waiting to its caller.
        assert (outcome(answer), answer.headers["retry-after"]) == ((429, "rate-limited"), "11")

    def test_a_doubled_slash_is_named(self, proxy: Proxy) -> None:
        """As a base URL that ends in one makes it: the listener reads no such path, and says so."""
        answer = proxy.ask(path="/chat//completions")
        assert (answer.status_code, answer.headers["content-type"]) == (400, "text/plain")
        assert "normal form: no doubled slash" in answer.text

    @pytest.mark.parametrize(
        ("method", "path", "refusal", "allow"),
        [
            ("POST", "chat/completions/", (404, "path-form"), None),
            ("POST", "threads", (404, "unknown-path"), None),
            ("POST", "models", (405, "wrong-method"), "GET"),
        ],
    )
    def test_a_path_that_policy_does_not_allow(
        self, method: str, path: str, refusal: tuple[int, str], allow: str | None, proxy: Proxy, gateway: Gateway
    ) -> None:
        gateway.relay.respond = refusing(problems.PATH_NOT_ALLOWED)
        answer = proxy.ask(method, path)
        assert (outcome(answer), answer.headers.get("allow")) == (refusal, allow)

    @pytest.mark.parametrize("when", ["before the answer", "in mid-answer"])
    def test_what_two_workers_were_lost_by_is_not_asked_again_by_the_program(
        self, proxy: Proxy, gateway: Gateway, when: str
    ) -> None:
        """In mid-answer, before anything of it opened, no refusal says so, but the answer's end."""
        if when == "in mid-answer":
            gateway.relay.bend = lambda pieces: pieces[:0]
        else:
            gateway.relay.respond = refusing(problems.WORKER_LOST)
        answer = proxy.ask()
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
        assert len(gateway.relay.sealed) == 2


# What is not the name of this proxy: a page whose name was pointed at loopback (DNS rebinding) sends its own.
STRANGE_HOSTS = (
    "evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "", "192.0.2.1:{port}", "0.0.0.0:{port}",
    "[::2]:{port}", "127.0.0.1.evil.example:{port}",
)  # fmt: skip
LOOPBACK = ("localhost:{port}", "LOCALHOST:{port}", "localhost.:{port}", "127.8.9.1:{port}", "[::1]:{port}", "[0:0::1]:{port}")
NO_KEY = ("", "Bearer", "Bearer wrong", "Bearer t0ken", "Basic {key}", "Bearer {key}x", "Bearer{key}", "x Bearer {key}")


class TestWhoGetsIn:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            *(({"host": host}, 421) for host in STRANGE_HOSTS),  # the key alone would not tell
            *(({"host": host}, 200) for host in LOOPBACK),
            *(({"authorization": key}, 401) for key in NO_KEY),
            *(({"authorization": key}, 200) for key in ("bearer {key}", "BEARER {key}", "Bearer   {key}")),  # RFC 9110, 11.1
            # what clients of Anthropic's API send, alone or beside the bearer
            ({"authorization": None, "x-api-key": "{key}"}, 200),
            ({"x-api-key": "{key}"}, 200),
            ({"x-api-key": "wrong"}, 401),
            ({"authorization": "Bearer x", "x-api-key": "{key}"}, 401),
            ({"authorization": None, "x-api-key": "Bearer {key}"}, 401),
            *(({"origin": page}, 403) for page in ("http://evil.example", "null", "http://localhost:3001", "")),
            ({"origin": PAGE}, 200),
            ({"origin": PAGE, "authorization": "Bearer x"}, 401),
        ],
        ids=str,
    )
    def test_by_its_headers(self, proxy: Proxy, gateway: Gateway, headers: dict[str, str | None], status: int) -> None:
        answer = proxy.ask(**headers)
        assert answer.status_code == status
        assert (answer.headers.get("access-control-allow-origin") == PAGE) == (headers.get("origin") == PAGE)
        assert bool(gateway.relay.requests) == (status == 200)
        if status == 401:
            assert (outcome(answer)[1], answer.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")
        if status == 421:
            assert "127.0.0.1" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("origin", [PAGE, "http://evil.example", "null", ""])
    def test_a_pages_preflight(self, proxy: Proxy, gateway: Gateway, origin: str) -> None:
        answer, allowed = proxy.ask("OPTIONS", origin=origin, **PREFLIGHT), origin == PAGE
        assert answer.status_code == (200 if allowed else 403)
        assert answer.headers.get("access-control-allow-origin") == (PAGE if allowed else None)
        assert not gateway.relay.requests


class TestErrors:
    def test_a_stream_that_breaks_says_so(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.bend = lambda pieces: without(pieces, 3)
        text = proxy.ask(body=STREAMED).text
        error = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]
        assert error["code"] == "open_error" and error["remedy"] and error["verification"]["sealed_to"]["pool"] == "default"
        assert "[DONE]" not in text

    def test_a_whole_answer_that_breaks_is_cut_off(
        self, proxy: Proxy, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Never a 200 that looks whole; where nothing opened before, it is an error."""

        async def long(_scope: Any, _receive: Any, send: Any) -> None:
            await reply(send, 200, {"text": "x" * 50_000})

        gateway.relay.bend = without
        assert outcome(proxy.ask()) == (502, "truncated_stream")
        monkeypatch.setattr(gateway.relay, "app", long)
        with pytest.raises(httpx2.RemoteProtocolError):
            proxy.ask()
        gateway.relay.bend = list
        assert len(proxy.ask().json()["text"]) == 50_000

    def test_what_cannot_be_sealed(self, proxy: Proxy, gateway: Gateway) -> None:
        assert outcome(proxy.ask(body=b"x" * (8 * 2**20))) == (413, "message_too_large")
        assert not gateway.relay.requests

    async def test_many_bodies_at_once(self) -> None:
        """All together have a bound: whoever finds no room is told to come back, and what ended leaves its room."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def waiting(_scope: Any, _receive: Any, send: Any) -> None:
            begun.set()
            await go.wait()
            await reply(send, 200, {})

        door = proxying.ProxyAccess.on(80, "k" * 32, names=["proxy"])
        headers = {"authorization": f"Bearer {door.key}", "content-type": "application/octet-stream"}
        async with connect_async(Relay(waiting)) as client:
            wire = httpx2.ASGITransport(proxying.create_app(client, door, held=1000))
            async with httpx2.AsyncClient(base_url="http://proxy/v1/", headers=headers, transport=wire) as caller:
                first = asyncio.create_task(caller.post("predict", content=b"x" * 600))
                await begun.wait()
                refused = await caller.post("predict", content=b"x" * 401)
                assert (outcome(refused), refused.headers["retry-after"]) == ((503, "overloaded"), "1")
                go.set()
                statuses = [(await first).status_code, (await caller.post("predict", content=b"x" * 1000)).status_code]
        assert statuses == [200, 200]
        with pytest.raises(lacre.UsageError, match="use ASCII"):  # a key that no header carries
            proxying.ProxyAccess.on(80, "ключ" * 10)

    def test_an_answer_that_proves_nothing(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.respond = on_sealed(lambda: served(200, b"plain"))
        answer = proxy.ask()
        assert outcome(answer) == (502, "unsealed_response")
        assert "plain" not in answer.text

    def test_other_paths(self, proxy: Proxy) -> None:
        answer = proxy.ask("GET", proxy.told["base_url"].removesuffix("/v1") + "/chat/completions")
        assert outcome(answer) == (404, "unknown_url")
        assert "/v1" in answer.json()["error"]["message"]


class TestErrorsOfMessages:
    """In Anthropic's shape, whoever refuses."""

    @pytest.mark.parametrize(
        ("problem", "kind"),
        [
            (problems.RATE_LIMITED, "rate_limit_error"),
            (problems.UNKNOWN_POOL, "not_found_error"),
            (problems.FORBIDDEN, "permission_error"),
            (problems.NO_WORKER, "overloaded_error"),
        ],
        ids=lambda value: getattr(value, "slug", ""),
    )
    def test_the_gateways(self, proxy: Proxy, gateway: Gateway, problem: problems.Problem, kind: str) -> None:
        gateway.relay.respond = refusing(problem)
        with self.client(proxy) as client, pytest.raises(anthropic.APIStatusError) as refused:
            client.messages.create(**ASKED)
        told = refused.value.response.json()
        assert (refused.value.status_code, told["type"], told["error"]["type"]) == (problem.status, "error", kind)
        assert refused.value.type == kind and told["error"]["code"]

    def test_the_proxys_own(self, proxy: Proxy) -> None:
        for answer, kind in (
            (proxy.ask(path="messages", body=b"x" * (8 * 2**20)), "request_too_large"),
            (proxy.ask(path="messages", **{"x-api-key": "wrong"}), "authentication_error"),
            (proxy.ask("OPTIONS", path="messages/count_tokens"), "invalid_request_error"),
        ):
            assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)

    def test_a_broken_answer(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.bend = lambda pieces: without(pieces, 3)
        with self.client(proxy) as client, pytest.raises(anthropic.APIError, match="did not open") as broken:
            list(client.messages.create(**ASKED, stream=True))
        assert isinstance(broken.value.body, dict) and broken.value.body["error"]["type"] == "api_error"

    @staticmethod
    def client(proxy: Proxy) -> anthropic.Anthropic:
        base = proxy.told["base_url"].removesuffix("/v1")
        return anthropic.Anthropic(base_url=base, api_key=proxy.told["api_key"], max_retries=0)


def raw(proxy: Proxy, *lines: bytes) -> bytes:
    """The whole answer to bytes of one's own."""
    data = proxy.filled(b"\r\n".join(lines).decode("latin-1")).encode("latin-1")
    with socket.create_connection(("127.0.0.1", httpx2.URL(proxy.told["base_url"]).port or 0), 20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


POST = b"POST /v1/chat/completions HTTP/1.1"
KEY = b"Authorization: Bearer {key}"
HOST = b"Host: 127.0.0.1:{port}"
CLOSE = b"Connection: close"
CONTENT = (b"Content-Length: 2", CLOSE, b"", b"{}")


class TestBytesOfAnyKind:
    @pytest.mark.parametrize(
        ("lines", "status"),
        [
            ((POST, HOST, KEY, b"Content-Type: \xff\xfe", *CONTENT), b"400"),
            ((POST, HOST, KEY, b"Content-Type: a", b"Content-Type: b", *CONTENT), b"400"),
            ((POST, HOST, KEY, b"Accept: \xe9", *CONTENT), b"400"),
            ((POST, HOST, KEY, KEY, *CONTENT), b"401"),
            ((POST, HOST, KEY, b"Authorization: Bearer x", *CONTENT), b"401"),
            ((POST, HOST, b"Authorization: \xff", *CONTENT), b"401"),
            ((POST, b"Host: \xff", KEY, *CONTENT), b"400"),
            ((POST, HOST, HOST, KEY, *CONTENT), b"400"),
            ((POST, HOST, KEY, b"Transfer-Encoding: gzip, chunked", b"", b"0", b"", b""), b"501"),
            ((POST, HOST, b"Transfer-Encoding: chunked", CLOSE, b"", b"0", KEY, b"", b""), b"401"),
            ((b"POST /v1/ch%61t/completions HTTP/1.1", HOST, KEY, *CONTENT), b"400"),
            ((b"GET /v1/\xff HTTP/1.1", HOST, KEY, b"", b""), b"400"),
            ((b"GET /v1/x?\xff HTTP/1.1", HOST, KEY, b"", b""), b"400"),
            ((POST, HOST, KEY, b"a: " + b"b" * 70_000, b"", b""), b"431"),
            ((b"GET /v1/" + b"a" * 70_000,), b"414"),
            ((POST, HOST, KEY, *[b"a:b"] * 200, b"", b""), b"431"),
        ],
    )
    def test_a_refusal_and_no_more(self, proxy: Proxy, gateway: Gateway, lines: tuple[bytes, ...], status: bytes) -> None:
        """Nothing is sealed, nothing fails in a way that nobody foresaw."""
        told = raw(proxy, *lines)
        assert told.startswith(b"HTTP/1.1 " + status), told
        assert not gateway.relay.requests

    def test_a_model_whose_name_has_a_slash(self, proxy: Proxy, gateway: Gateway) -> None:
        """OpenAI's library encodes it, and it is a part of the name."""
        told = raw(proxy, b"GET /v1/models/a%2Fb HTTP/1.1", HOST, KEY, CLOSE, b"", b"")
        assert told.startswith(b"HTTP/1.1 404") and b"model_not_found" in told
        [inside] = gateway.relay.opened
        assert inside.request.path == "/v1/models/a%2Fb"


class TestStarting:
    def ends(self, gateway: Gateway, home: Path, *options: str, code: int = 1, **env: str) -> str:
        """What it says as it ends at once; no key of a proxy that does not run is among it."""
        command, env = [*LACRE, "proxy", "--port", "0", *options], settings(gateway, home) | env
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        return done.stderr

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            *((("--host", host), "--allow-remote") for host in ("0.0.0.0", "::", "192.0.2.1")),
            *((("--allow-host", host), "is not a host") for host in ("two words", "http://box.lan", "box.lan/x", "[::1")),
            (("--allow-host", ""), "is empty"),
            (("--allow-origin", "*"), "is not the origin of a web page"),
            (("--key-file", "."), "is not a file: name one"),
        ],
        ids=str,
    )
    def test_options_that_are_none(self, gateway: Gateway, tmp_path: Path, options: tuple[str, str], says: str) -> None:
        told = self.ends(gateway, tmp_path, *options)
        assert says in told and "chmod" not in told

    @pytest.mark.parametrize(
        "options",
        [
            *(["--host", host] for host in ("127.0.0.2", "localhost", "::1", "0:0:0:0:0:0:0:1")),
            *(["--host", host, "--allow-remote"] for host in ("0.0.0.0", "::")),
        ],
        ids=" ".join,
    )
    def test_it_answers_at_the_address_that_it_prints(self, gateway: Gateway, tmp_path: Path, options: list[str]) -> None:
        with running(gateway, tmp_path, *options) as proxy:
            assert proxy.ask("GET", "models").status_code == 200

    def test_where_it_listens_on_all_addresses_each_is_its_own(self, gateway: Gateway, tmp_path: Path) -> None:
        allowed = ("192.0.2.1", "0.0.0.0", "[2001:db8::1]", "box.LAN")
        with running(gateway, tmp_path, "--host", "0.0.0.0", "--allow-remote", "--allow-host", "Box.lan") as proxy:
            statuses = [proxy.ask("GET", "models", host=host + ":{port}").status_code for host in (*allowed, "other.lan")]
        assert statuses == [200] * 4 + [421]

    def test_an_allowed_origin_as_people_copy_it(self, gateway: Gateway, tmp_path: Path) -> None:
        with running(gateway, tmp_path, "--allow-origin", "http://LOCALHOST:3000/") as proxy:
            assert proxy.ask("GET", "models", origin=PAGE).headers["access-control-allow-origin"] == PAGE

    @pytest.mark.parametrize("folder", ["", "My keys", "it's", "$HOME", 'a"b', "`id`", "new\nline", "José"])
    def test_a_shell_reads_what_it_prints(self, gateway: Gateway, tmp_path: Path, folder: str) -> None:
        """folder: of the key's file; empty where the key itself is printed."""
        file = tmp_path / folder / "the key"
        file.parent.mkdir(exist_ok=True)
        with started(gateway, tmp_path, *(("--key-file", str(file)) if folder else ())) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stderr.readline()  # it was told by then
            process.terminate()
            told = process.stdout.read()
        names = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY")
        script = f'{told}\nprintf "%s %s %s %s" ' + " ".join(f'"${name}"' for name in names)
        read = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout
        url, key, origin, same = read.split(" ")
        assert url.startswith("http://127.0.0.1:") and url == f"{origin}/v1"
        assert key == same
        assert len(key) >= 32 and (not folder or key == file.read_text().strip())

    def test_a_gateway_that_it_cannot_reach(self, gateway: Gateway, tmp_path: Path) -> None:
        """Where nobody speaks TLS a client fails at once; it would wait for a gateway that is away."""
        self.ends(gateway, tmp_path, code=4, LACRE_URL=gateway.url.replace("lacre+http://", "lacre://"))

    def test_a_key_file_is_made_once_and_for_its_owner(self, gateway: Gateway, tmp_path: Path) -> None:
        file = tmp_path / "proxy.key"
        for _ in range(2):
            with running(gateway, tmp_path, "--key-file", str(file)) as proxy:
                assert proxy.told["key_file"] == str(file) and "api_key" not in proxy.told
                proxy.told["api_key"] = file.read_text().strip()
                assert proxy.ask().status_code == 200
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize(("mode", "text", "says"), [(0o644, "k" * 43, "chmod 600"), (0o600, "short", "32 characters")])
    def test_a_key_file_that_is_none(self, gateway: Gateway, tmp_path: Path, mode: int, text: str, says: str) -> None:
        file = tmp_path / "proxy.key"
        file.write_text(text)
        file.chmod(mode)
        told = self.ends(gateway, tmp_path, "--key-file", str(file))
        assert says in told and text not in told
