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
from parts.relay import AsyncWire, Relay, served
from parts.up import LACRE

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "the sea"}]}
SEALED = "/v1/sealed"


@dataclass
class Proxy:
    process: subprocess.Popen[str]
    told: dict[str, Any]

    def client(self, **headers: str) -> httpx2.Client:
        """headers: beside the key's."""
        return httpx2.Client(
            base_url=self.told["base_url"] + "/",
            headers={"authorization": f"Bearer {self.told['api_key']}"} | headers,
            timeout=60,
            trust_env=False,
        )


def over_tls(gateway: Gateway) -> str:
    """An address where nobody speaks TLS: the client fails at once, where it would wait for a gateway that is away."""
    return gateway.url.replace("lacre+http://", "lacre://")


@contextmanager
def running(gateway: Gateway, home: Path, *options: str) -> Iterator[Proxy]:
    command = [*LACRE, "proxy", "--port", "0", "--json", *options]
    process = subprocess.Popen(command, env=settings(gateway, home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Proxy(process, json.loads(line))
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def engine() -> Iterator[EchoEngine]:
    engine = EchoEngine(name="tiny", n_ctx=512)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def gateway(engine: EchoEngine) -> Iterator[Gateway]:
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live


@pytest.fixture(scope="module")
def proxy(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    origin = ("--allow-origin", "http://localhost:3000")
    with running(gateway, tmp_path_factory.mktemp("home"), *origin) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def honest(gateway: Gateway) -> Iterator[None]:
    gateway.relay.requests.clear()
    gateway.relay.opened.clear()
    yield
    gateway.relay.respond, gateway.relay.bend, gateway.before = lambda _request: None, list, None


def sealed(gateway: Gateway) -> list[httpx2.Request]:
    return [request for request in gateway.relay.requests if request.url.path == SEALED]


class TestWhatPasses:
    def test_a_whole_answer(self, proxy: Proxy, gateway: Gateway) -> None:
        with proxy.client(cookie="c00kie", traceparent="00-telling") as client:
            answer = client.post("chat/completions", json={**BODY, "user": "jo@example.com"})
        assert answer.json()["choices"][0]["message"]["content"] == "the sea"
        assert "server" not in answer.headers
        [inside], [outside] = gateway.relay.opened, sealed(gateway)
        assert json.loads(inside.request.content) == BODY
        assert not {name for name, _value in inside.request.headers} & {"cookie", "traceparent", "authorization"}
        assert outside.headers["authorization"] == "Bearer t0ken"  # the proxy's own key goes nowhere
        assert b"the sea" not in outside.content and proxy.told["api_key"] not in str(outside.headers)

    def test_pieces_pass_while_the_answer_is_still_sealed(self, proxy: Proxy, gateway: Gateway) -> None:
        """The gateway holds the later records back until the program has seen the first token."""
        seen = threading.Event()

        async def before(i: int) -> None:
            if i == 4:
                assert await asyncio.to_thread(seen.wait, 30)

        gateway.before = before
        with proxy.client() as client, client.stream("POST", "chat/completions", json={**BODY, "stream": True}) as answer:
            lines = []
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    lines.append(line)
                    if '"content":"t"' in line.replace(" ", ""):
                        seen.set()
        assert seen.is_set() and lines[-1] == "data: [DONE]"
        assert answer.headers["x-accel-buffering"] == "no"

    def test_models(self, proxy: Proxy) -> None:
        with proxy.client() as client:
            assert [model["id"] for model in client.get("models").json()["data"]] == ["tiny"]
            assert client.get("models/tiny?x=1").json()["id"] == "tiny"

    def test_the_workers_error(self, proxy: Proxy) -> None:
        with proxy.client() as client:
            answer = client.post("chat/completions", json={**BODY, "model": "gone"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    def test_a_gateways_refusal(self, proxy: Proxy, gateway: Gateway) -> None:
        def refuse(request: httpx2.Request) -> httpx2.Response | None:
            return served(429, problems.RATE_LIMITED.body(), {"retry-after": "11"}) if request.url.path == SEALED else None

        gateway.relay.respond = refuse
        with proxy.client() as client:
            answer = client.post("chat/completions", json=BODY)
        # Longer than `PATIENCE` of lacre.exchange.retry: the proxy leaves the waiting to its caller.
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "11")
        assert answer.json()["error"]["code"] == "rate-limited"

    def test_a_doubled_slash_is_named(self, proxy: Proxy) -> None:
        """As a base URL that ends in one makes it: the listener reads no such path, and says so."""
        with proxy.client() as client:
            answer = client.post("/chat//completions", json=BODY)
        assert (answer.status_code, answer.headers["content-type"]) == (400, "text/plain")
        assert "normal form: no doubled slash" in answer.text

    @pytest.mark.parametrize(
        ("method", "path", "status", "code", "allow"),
        [
            ("POST", "chat/completions/", 404, "path-form", None),
            ("POST", "responses", 404, "unknown-path", None),
            ("POST", "models", 405, "wrong-method", "GET"),
        ],
    )
    def test_a_path_that_policy_does_not_allow(
        self, method: str, path: str, status: int, code: str, allow: str | None, proxy: Proxy, gateway: Gateway
    ) -> None:
        def refuse(request: httpx2.Request) -> httpx2.Response | None:
            return served(403, problems.PATH_NOT_ALLOWED.body()) if request.url.path == SEALED else None

        gateway.relay.respond = refuse
        with proxy.client() as client:
            answer = client.request(method, path, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers.get("allow") == allow

    def test_what_workers_were_lost_by_is_not_asked_again_by_the_program(self, proxy: Proxy, gateway: Gateway) -> None:
        def lose(request: httpx2.Request) -> httpx2.Response | None:
            return served(502, problems.WORKER_LOST.body()) if request.url.path == SEALED else None

        gateway.relay.respond, gateway.relay.requests = lose, []
        with proxy.client() as client:
            answer = client.post("chat/completions", json=BODY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
        assert sum(request.url.path == SEALED for request in gateway.relay.requests) == 2

    def test_nor_what_they_were_lost_by_in_mid_answer(self, proxy: Proxy, gateway: Gateway) -> None:
        """Before anything of it opened: no refusal says so, but the answer's end."""
        gateway.relay.bend = lambda pieces: pieces[:0]
        asked = len(gateway.relay.opened)
        with proxy.client() as client:
            answer = client.post("chat/completions", json=BODY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
        assert len(gateway.relay.opened) == asked + 2


class TestWhoGetsIn:
    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:{port}",
            "127.0.0.1",
            "localhost:1",
            "",
            "192.0.2.1:{port}",
            "0.0.0.0:{port}",
            "[::2]:{port}",
            "127.0.0.1.evil.example:{port}",
        ],
    )
    def test_another_host_is_refused(self, proxy: Proxy, gateway: Gateway, host: str) -> None:
        """A page whose name was pointed at loopback (DNS rebinding) sends its own name; the key alone would not tell."""
        port = httpx2.URL(proxy.told["base_url"]).port
        with proxy.client(host=host.format(port=port)) as client:
            answer = client.post("chat/completions", json=BODY)
        assert answer.status_code == 421
        assert "127.0.0.1" in answer.json()["error"]["message"]
        assert not gateway.relay.requests

    @pytest.mark.parametrize("sent", ["bearer {key}", "BEARER {key}", "Bearer   {key}"])
    def test_the_schemes_case_and_blanks_make_no_difference(self, proxy: Proxy, sent: str) -> None:
        """RFC 9110 sections 11.1 and 11.4."""
        with proxy.client(authorization=sent.format(key=proxy.told["api_key"])) as client:
            assert client.get("models").status_code == 200

    @pytest.mark.parametrize(
        "host",
        ["localhost:{port}", "LOCALHOST:{port}", "localhost.:{port}", "127.8.9.1:{port}", "[::1]:{port}", "[0:0::1]:{port}"],
    )
    def test_loopbacks_names(self, proxy: Proxy, host: str) -> None:
        port = httpx2.URL(proxy.told["base_url"]).port
        with proxy.client(host=host.format(port=port)) as client:
            assert client.post("chat/completions", json=BODY).status_code == 200

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3001", ""])
    @pytest.mark.parametrize("method", ["POST", "OPTIONS"])
    def test_a_web_page_is_refused(self, proxy: Proxy, gateway: Gateway, origin: str, method: str) -> None:
        with proxy.client(origin=origin, **{"access-control-request-method": "POST"}) as client:
            answer = client.request(method, "chat/completions", json=BODY)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert not gateway.relay.requests

    def test_an_allowed_page_may(self, proxy: Proxy) -> None:
        page = "http://localhost:3000"
        with proxy.client(origin=page) as client:
            preflight = client.options("chat/completions", headers={"access-control-request-method": "POST"})
            answer = client.post("chat/completions", json=BODY)
        for each in (preflight, answer):
            assert (each.status_code, each.headers["access-control-allow-origin"]) == (200, page)

    @pytest.mark.parametrize(
        "sent", ["", "Bearer", "Bearer wrong", "Bearer t0ken", "Basic {key}", "Bearer {key}x", "Bearer{key}", "x Bearer {key}"]
    )
    def test_without_the_key(self, proxy: Proxy, gateway: Gateway, sent: str) -> None:
        with proxy.client(authorization=sent.format(key=proxy.told["api_key"])) as client:
            answer = client.post("chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert not gateway.relay.requests

    def test_a_page_without_the_key(self, proxy: Proxy) -> None:
        with proxy.client(origin="http://localhost:3000", authorization="Bearer x") as client:
            assert client.post("chat/completions", json=BODY).status_code == 401


class TestErrors:
    def test_a_stream_that_breaks_says_so(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.bend = lambda pieces: [*pieces[:3], pieces[4], *pieces[5:]]
        with proxy.client() as client:
            text = client.post("chat/completions", json={**BODY, "stream": True}).text
        last = text.strip().splitlines()[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "open_error" and error["remedy"] and error["verification"]["sealed_to"]["pool"] == "default"
        assert "[DONE]" not in text

    def test_a_whole_answer_of_which_nothing_opened(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.bend = without
        with proxy.client() as client:
            answer = client.post("chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "truncated_stream")

    def test_a_whole_answer_that_breaks_is_cut_off(
        self, proxy: Proxy, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Never a 200 that looks whole."""

        async def long(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
            await reply(send, 200, {"text": "x" * 50_000})

        monkeypatch.setattr(gateway.relay, "app", long)
        with proxy.client() as client:
            assert len(client.post("chat/completions", json=BODY).json()["text"]) == 50_000
            gateway.relay.bend = without
            with pytest.raises(httpx2.RemoteProtocolError):
                client.post("chat/completions", json=BODY)

    def test_what_cannot_be_sealed(self, proxy: Proxy, gateway: Gateway) -> None:
        with proxy.client() as client:
            answer = client.post("chat/completions", content=b"x" * (8 * 2**20))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "message_too_large")
        assert not gateway.relay.requests

    async def test_many_bodies_at_once(self) -> None:
        """All together have a bound: whoever finds no room is told to come back, and what ended leaves its room."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def waiting(_scope: Any, _receive: Any, send: Any) -> None:
            begun.set()
            await go.wait()
            await reply(send, 200, {})

        relay, door = Relay(waiting), proxying.ProxyAccess.on(80, "k" * 32, names=["proxy"])
        headers = {"authorization": f"Bearer {door.key}", "content-type": "application/octet-stream"}
        async with lacre.AsyncClient(relay.url, token="t", memory=lacre.VersionMemory(), transport=AsyncWire(relay)) as client:
            wire = httpx2.ASGITransport(proxying.create_app(client, door, held=1000))
            async with httpx2.AsyncClient(base_url="http://proxy/v1/", headers=headers, transport=wire) as caller:
                first = asyncio.create_task(caller.post("predict", content=b"x" * 600))
                await begun.wait()
                refused = await caller.post("predict", content=b"x" * 401)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
                assert refused.headers["retry-after"] == "1"
                go.set()
                statuses = [(await first).status_code, (await caller.post("predict", content=b"x" * 1000)).status_code]
        assert statuses == [200, 200]

    def test_an_answer_that_proves_nothing(self, proxy: Proxy, gateway: Gateway) -> None:
        gateway.relay.respond = lambda request: served(200, b"plain") if request.url.path == SEALED else None
        with proxy.client() as client:
            answer = client.post("chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "unsealed_response")
        assert "plain" not in answer.text

    def test_other_paths(self, proxy: Proxy) -> None:
        with proxy.client() as client:
            answer = client.get(proxy.told["base_url"].removesuffix("/v1") + "/chat/completions")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
        assert "/v1" in answer.json()["error"]["message"]


def raw(proxy: Proxy, *lines: bytes) -> bytes:
    """The whole answer to bytes of one's own; `{key}` and `{port}` stand for the proxy's."""
    port = httpx2.URL(proxy.told["base_url"]).port
    assert port is not None
    known = {b"{key}": proxy.told["api_key"].encode(), b"{port}": str(port).encode()}
    data = b"\r\n".join(lines)
    for name, value in known.items():
        data = data.replace(name, value)
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(data)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


POST = b"POST /v1/chat/completions HTTP/1.1"
KEY = b"Authorization: Bearer {key}"
HOST = b"Host: 127.0.0.1:{port}"
CLOSE = b"Connection: close"


class TestBytesOfAnyKind:
    @pytest.mark.parametrize(
        ("lines", "status"),
        [
            ((POST, HOST, KEY, b"Content-Type: \xff\xfe", b"Content-Length: 2", CLOSE, b"", b"{}"), b"400"),
            ((POST, HOST, KEY, b"Content-Type: a", b"Content-Type: b", b"Content-Length: 2", CLOSE, b"", b"{}"), b"400"),
            ((POST, HOST, KEY, b"Accept: \xe9", b"Content-Length: 2", CLOSE, b"", b"{}"), b"400"),
            ((POST, HOST, KEY, KEY, b"Content-Length: 2", CLOSE, b"", b"{}"), b"401"),
            ((POST, HOST, KEY, b"Authorization: Bearer x", b"Content-Length: 2", CLOSE, b"", b"{}"), b"401"),
            ((POST, HOST, b"Authorization: \xff", b"Content-Length: 2", CLOSE, b"", b"{}"), b"401"),
            ((POST, b"Host: \xff", KEY, b"Content-Length: 2", b"", b"{}"), b"400"),
            ((POST, HOST, HOST, KEY, b"Content-Length: 2", b"", b"{}"), b"400"),
            ((POST, HOST, KEY, b"Transfer-Encoding: gzip, chunked", b"", b"0", b"", b""), b"501"),
            ((POST, HOST, b"Transfer-Encoding: chunked", CLOSE, b"", b"0", KEY, b"", b""), b"401"),
            ((b"POST /v1/ch%61t/completions HTTP/1.1", HOST, KEY, b"Content-Length: 2", b"", b"{}"), b"400"),
            ((b"GET /v1/\xff HTTP/1.1", HOST, KEY, b"", b""), b"400"),
            ((b"GET /v1/x?\xff HTTP/1.1", HOST, KEY, b"", b""), b"400"),
            ((POST, HOST, KEY, b"a: " + b"b" * 70_000, b"", b""), b"431"),
            ((b"GET /v1/" + b"a" * 70_000,), b"414"),
            ((POST, HOST, KEY, *[b"a:b"] * 200, b"", b""), b"431"),
        ],
    )  # fmt: skip
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
    def run(self, home: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
        gateway = Gateway(Relay(lambda scope, receive, send: None))  # type: ignore[arg-type, return-value]
        gateway.url = gateway.relay.url
        return subprocess.run(
            [*LACRE, "proxy", "--port", "0", *options],
            check=False,
            capture_output=True,
            text=True,
            env=settings(gateway, home) | env,
        )

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
    def test_beyond_loopback_only_when_told(self, tmp_path: Path, host: str) -> None:
        done = self.run(tmp_path, "--host", host)
        assert done.returncode == 1
        assert "--allow-remote" in done.stderr

    @pytest.mark.parametrize(
        "options",
        [
            ["--host", "127.0.0.2"],
            ["--host", "localhost"],
            ["--host", "0.0.0.0", "--allow-remote"],
            ["--host", "::1"],
            ["--host", "0:0:0:0:0:0:0:1"],
            ["--host", "::", "--allow-remote"],
        ],
    )
    def test_it_answers_at_the_address_that_it_prints(self, gateway: Gateway, tmp_path: Path, options: list[str]) -> None:
        with running(gateway, tmp_path, *options) as proxy, proxy.client() as client:
            assert client.get("models").status_code == 200

    def test_where_it_listens_on_all_addresses_each_is_its_own(self, gateway: Gateway, tmp_path: Path) -> None:
        with running(gateway, tmp_path, "--host", "0.0.0.0", "--allow-remote", "--allow-host", "Box.lan") as proxy:
            port = httpx2.URL(proxy.told["base_url"]).port
            for host, status in (
                ("192.0.2.1", 200),
                ("0.0.0.0", 200),
                ("[2001:db8::1]", 200),
                ("box.LAN", 200),
                ("other.lan", 421),
            ):
                with proxy.client(host=f"{host}:{port}") as client:
                    assert client.get("models").status_code == status, host

    @pytest.mark.parametrize("name", ["", "two words", "http://box.lan", "box.lan/x", "[::1"])
    def test_an_allowed_host_that_is_none(self, tmp_path: Path, name: str) -> None:
        done = self.run(tmp_path, "--allow-host", name)
        assert done.returncode == 1
        assert ("is not a host" if name else "is empty") in done.stderr

    def test_an_allowed_origin_that_is_none(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "--allow-origin", "*")
        assert done.returncode == 1
        assert "is not the origin of a web page" in done.stderr

    def test_an_allowed_origin_as_people_copy_it(self, gateway: Gateway, tmp_path: Path) -> None:
        with running(gateway, tmp_path, "--allow-origin", "http://LOCALHOST:3000/") as proxy, proxy.client() as client:
            answer = client.get("models", headers={"origin": "http://localhost:3000"})
            assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"

    def test_a_key_that_no_header_carries(self) -> None:
        with pytest.raises(lacre.UsageError, match="use ASCII"):
            proxying.ProxyAccess.on(80, "ключ" * 10)

    def test_a_key_file_that_is_a_folder(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "--key-file", str(tmp_path))
        assert done.returncode == 1
        assert "is not a file: name one" in done.stderr and "chmod" not in done.stderr

    @pytest.mark.parametrize("folder", ["My keys", "it's", "$HOME", 'a"b', "`id`", "new\nline", "José"])
    def test_a_shell_reads_what_it_prints(self, gateway: Gateway, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "the key"
        command = [*LACRE, "proxy", "--port", "0", "--key-file", str(file)]
        process = subprocess.Popen(
            command, env=settings(gateway, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        process.stderr.readline()  # it was told by then
        process.terminate()
        told = process.communicate(timeout=30)[0]
        script = f'{told}\nprintf %s "$OPENAI_API_KEY"'
        assert (
            subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout == file.read_text().strip()
        )

    def test_a_gateway_that_it_cannot_reach(self, gateway: Gateway, tmp_path: Path) -> None:
        done = self.run(tmp_path, LACRE_URL=over_tls(gateway))
        assert done.returncode == 4
        assert not done.stdout  # no key of a proxy that does not run

    def test_a_key_file_is_made_once_and_for_its_owner(self, gateway: Gateway, tmp_path: Path) -> None:
        file = tmp_path / "proxy.key"
        for _ in range(2):
            with running(gateway, tmp_path, "--key-file", str(file)) as proxy:
                assert proxy.told["key_file"] == str(file)
                assert "api_key" not in proxy.told
                proxy.told["api_key"] = file.read_text().strip()
                with proxy.client() as client:
                    assert client.post("chat/completions", json=BODY).status_code == 200
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize(("mode", "text", "says"), [(0o644, "k" * 43, "chmod 600"), (0o600, "short", "32 characters")])
    def test_a_key_file_that_is_none(self, tmp_path: Path, mode: int, text: str, says: str) -> None:
        file = tmp_path / "proxy.key"
        file.write_text(text)
        file.chmod(mode)
        done = self.run(tmp_path, "--key-file", str(file))
        assert done.returncode == 1
        assert says in done.stderr and text not in done.stderr

    def test_what_it_prints_is_for_a_shell(self, gateway: Gateway, tmp_path: Path) -> None:
        command = [*LACRE, "proxy", "--port", "0"]
        process = subprocess.Popen(
            command, env=settings(gateway, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.terminate()
        process.communicate(timeout=30)
        assert [line.partition("=")[0] for line in lines] == ["export OPENAI_BASE_URL", "export OPENAI_API_KEY"]
