"""The JavaScript client, written from docs/wire.md alone, against the Python side as it really opens and seals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import anyio
import cryptography_vectors
import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import asgi
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Manifest
from lacre.wire.header import MEDIA_TYPE_RESPONSE, Kem
from parts.bent import flipped, swapped, without
from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.npm import install
from parts.relay import Relay, served

HERE = Path(__file__).resolve().parent
KEMS = {"xwing": Kem.XWING, "x25519": Kem.X25519}
NODE = shutil.which("node")
NPM = shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


@pytest.fixture(scope="session", autouse=True)
def packages() -> None:
    install(HERE)


def node(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(NODE), *args], cwd=HERE, capture_output=True, text=True, check=False)


def test_the_lock_names_no_host() -> None:
    assert "://" not in (HERE / "package-lock.json").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in (HERE.parents[1] / "docs" / "vectors").glob("*.json")))
def test_published_vectors(name: str) -> None:
    done = node("vectors.mjs", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") > 15


def test_official_vectors() -> None:
    folder = Path(cryptography_vectors.__file__).parent / "HPKE"
    done = node("official.mjs", str(folder / "test-vectors.json"), str(folder / "hpke-pq-test-vectors.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HPKE: 4 vectors" in done.stdout


def test_rules_that_no_exchange_shows() -> None:
    done = node("--test", "--test-reporter=tap")
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Ran:
    code: int
    pieces: list[str]
    totals: dict[str, Any] | None
    error: dict[str, Any] | None


def environment(url: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LACRE_URL": url, "LACRE_TOKEN": "t0ken"}


async def chat(gateway: Gateway, *options: str, url: str | None = None) -> Ran:
    command = [str(NODE), "client.mjs", *options, "How many Baltic states?"]
    done = await anyio.run_process(command, cwd=HERE, env=environment(url or gateway.url), check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    totals = lines.pop() if lines and lines[-1].get("done") else None
    assert (totals is None) == (done.returncode != 0), done.stderr
    assert bool(done.stderr) == (done.returncode != 0), done.stderr
    error = json.loads(done.stderr) if done.stderr else None
    return Ran(done.returncode, [line["piece"] for line in lines], totals, error)


@pytest.mark.parametrize("kem", KEMS)
async def test_a_sealed_chat(kem: str) -> None:
    app = ChatApp()
    async with serving(Gateway(Relay(app, kem=KEMS[kem]))) as gateway:
        ran = await chat(gateway, "--kem", kem)
    assert ran.pieces == ["one ", "two ", "three"]
    assert ran.totals is not None
    assert (ran.totals["kem"], ran.totals["pieces"], ran.totals["attempts"]) == (kem, 3, 1)

    manifest, sealed = gateway.relay.requests
    assert "authorization" not in manifest.headers
    expected = {
        "authorization": "Bearer t0ken",
        "content-type": "message/ohttp-chunked-req",
        "accept": "message/ohttp-chunked-res",
        "incremental": "?1",
        "lacre-pool": "default",
        "lacre-model": "tiny",
        "lacre-action": "chat",
        "lacre-max-tokens": "512",
        "lacre-shape": "none",
    }
    of_http = {"host", "connection", "content-length"}
    assert {name: value for name, value in sealed.headers.items() if name not in of_http} == expected
    assert b"Baltic" not in sealed.content
    asked = json.loads(app.bodies[0])
    assert asked["messages"] == [{"role": "user", "content": "How many Baltic states?"}]
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("tiny", 512, True)
    inner = {name.decode() for name, _value in app.scopes[0]["headers"]}
    assert not inner & {"authorization", "cookie", "user-agent"}


@pytest.mark.parametrize("kem", KEMS)
async def test_pieces_come_out_while_the_answer_is_still_sealed(kem: str) -> None:
    """The record of the second piece leaves the server only when the client has printed the first."""
    seen = anyio.Event()

    async def before(i: int) -> None:
        if i == 3:
            await seen.wait()

    async with serving(Gateway(Relay(ChatApp(), kem=KEMS[kem]), before)) as gateway:
        command = [str(NODE), "client.mjs", "--kem", kem, "x"]
        async with await anyio.open_process(command, cwd=HERE, env=environment(gateway.url)) as process:
            assert process.stdout is not None
            out = b""
            while b"\n" not in out:
                out += await process.stdout.receive()
            assert json.loads(out.splitlines()[0]) == {"piece": "one "}
            assert b"done" not in out
            seen.set()
            async for more in process.stdout:
                out += more
            assert await process.wait() == 0
    assert json.loads(out.splitlines()[-1])["done"] is True


BENT = {
    "the last chunk is left out": (without, "TruncatedError"),
    "the answer stops inside a record": (lambda pieces: [*pieces[:2], pieces[2][:5]], "TruncatedError"),
    "a record is altered": (lambda pieces: [*pieces[:2], flipped(pieces[2]), *pieces[3:]], "AlteredError"),
    "the last chunk is altered": (lambda pieces: [*pieces[:-1], flipped(pieces[-1])], "AlteredError"),
    "two records are swapped": (lambda pieces: swapped(pieces, 2, 3), "AlteredError"),
    "a record is left out": (lambda pieces: without(pieces, 2), "AlteredError"),
    "a record comes twice": (lambda pieces: [*pieces[:3], *pieces[2:]], "AlteredError"),
    "a byte is added": (lambda pieces: [*pieces, b"\0"], "AlteredError"),
    "a record is announced too long": (lambda pieces: [*pieces[:2], b"\x80\x00\x40\x11"], "TooLargeError"),
}


@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("how", BENT)
async def test_a_bent_answer_is_an_error(kem: str, how: str) -> None:
    bend, error = BENT[how]
    async with serving(Gateway(Relay(ChatApp(), kem=KEMS[kem], bend=bend))) as gateway:
        ran = await chat(gateway, "--kem", kem)
    assert ran.code == 1
    assert ran.error is not None
    assert ran.error["error"] == error
    assert ran.pieces == ["one ", "two ", "three"][: len(ran.pieces)]
    assert gateway.paths == ["/v1/manifest", "/v1/sealed"], "nothing is tried again after the first record"


@dataclass
class ReceiptRelay(Relay):
    """A relay whose worker ends its answers with a receipt. `of`: what of the request it is for; all of it, in truth."""

    of: Callable[[bytes], bytes] = bytes
    receipt_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def manifest(self) -> Manifest:
        manifest = super().manifest()
        pool = dataclasses.replace(manifest.pools["default"], receipt_key=raw_public_key(self.receipt_key))
        return dataclasses.replace(manifest, pools={"default": pool})

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/v1/sealed":
            return await super().answer(request)
        header = request.content[: 7 + 1120]  # hdr and enc of X-Wing
        name = b64u(hashlib.sha256(self.of(header)).digest())
        token = Receipt(name, "sha256:00", 12, 0, 34, time.time() - 1, time.time(), final=True).sign(self.receipt_key)
        opened = asgi.open_sealed(request.content, {self.key.config.key_id: self.key})
        answer = asgi.answer(self.app, opened, asgi.Call("r1"), trailers=lambda: ((TRAILER, token),))
        return served(200, b"".join([chunk async for chunk in answer]), {"content-type": MEDIA_TYPE_RESPONSE})


async def test_a_receipt_is_read() -> None:
    async with serving(Gateway(ReceiptRelay(ChatApp()))) as gateway:
        ran = await chat(gateway)
    assert ran.totals is not None
    assert (ran.totals["receipt"]["prompt_tokens"], ran.totals["receipt"]["completion_tokens"]) == (12, 34)


async def test_a_receipt_of_another_request_is_none() -> None:
    async with serving(Gateway(ReceiptRelay(ChatApp(), of=flipped))) as gateway:
        ran = await chat(gateway)
    assert ran.totals is not None
    assert ran.totals["receipt"] == "does not verify"


class Cut(Exception):
    """Ends an answer by breaking its connection."""


async def test_a_broken_connection_is_a_truncated_answer() -> None:
    async def before(i: int) -> None:
        if i == 3:
            raise Cut

    async with serving(Gateway(Relay(ChatApp()), before)) as gateway:
        ran = await chat(gateway)
    assert ran.error is not None
    assert ran.error["error"] == "TruncatedError"


async def test_no_server_at_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = Relay(ChatApp()).url.replace(":9?", f":{listener.getsockname()[1]}?")
    ran = await chat(Gateway(Relay(ChatApp())), url=url)
    assert ran.error is not None
    assert ran.error["error"] == "TransportError"


async def test_x25519_only_where_it_is_offered() -> None:
    async with serving(Gateway(Relay(ChatApp(), kem=Kem.XWING))) as gateway:
        ran = await chat(gateway, "--kem", "x25519")
    assert ran.error is not None
    assert ran.error["error"] == "NoUsableKeyError"
    assert gateway.paths == ["/v1/manifest"], "nothing is sent without a key"


async def test_another_root_is_not_trusted() -> None:
    async with serving(Gateway(Relay(ChatApp()))) as gateway:
        other = Relay(ChatApp()).url.partition("?")[2]
        ran = await chat(gateway, url=f"{gateway.url.partition('?')[0]}?{other}")
    assert ran.error is not None
    assert ran.error["error"] == "TrustError"
    assert gateway.paths == ["/v1/manifest"], "no byte of the request leaves"


def problem(status: int, kind: str) -> httpx2.Response:
    body = json.dumps({"type": kind, "title": "Said in a test", "status": status}).encode()
    return served(status, body, {"content-type": "application/problem+json"})


OHTTP_KEY = "https://iana.org/assignments/http-problem-types#ohttp-key"


async def test_a_redirect_is_not_followed() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response | None:
        return served(307, b"", {"location": "/v1/elsewhere"}) if request.url.path == "/v1/sealed" else None

    async with serving(Gateway(Relay(ChatApp(), respond=respond))) as gateway:
        ran = await chat(gateway)
    assert ran.error is not None
    assert ran.error["error"] == "ProblemError"
    assert gateway.paths == ["/v1/manifest", "/v1/sealed"]


async def test_a_refusal_of_the_gateway_is_told() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response | None:
        return problem(403, "urn:lacre:problem:forbidden") if request.url.path == "/v1/sealed" else None

    async with serving(Gateway(Relay(ChatApp(), respond=respond))) as gateway:
        ran = await chat(gateway)
    assert ran.error is not None
    assert (ran.error["error"], ran.error["type"]) == ("ProblemError", "urn:lacre:problem:forbidden")
    assert gateway.paths.count("/v1/sealed") == 1


@pytest.mark.parametrize(("refusals", "code"), [(1, 0), (2, 1)])
async def test_an_unknown_key_is_sealed_anew_once(refusals: int, code: int) -> None:
    def refuse() -> Iterator[httpx2.Response | None]:
        yield from [problem(422, OHTTP_KEY)] * refusals
        while True:
            yield None

    refused = refuse()

    def respond(request: httpx2.Request) -> httpx2.Response | None:
        return next(refused) if request.url.path == "/v1/sealed" else None

    async with serving(Gateway(Relay(ChatApp(), respond=respond))) as gateway:
        ran = await chat(gateway)
    assert ran.code == code
    assert gateway.paths == ["/v1/manifest", "/v1/sealed"] * 2
    first, second = (r.content for r in gateway.relay.requests if r.url.path == "/v1/sealed")
    assert first[7:1127] != second[7:1127], "each attempt has its own encapsulation"


async def test_a_wrong_clock_is_corrected_once() -> None:
    app = ChatApp()
    theirs = time.time() + 5000
    dates: list[bytes] = []

    async def strict(scope: Any, receive: Any, send: Any) -> None:
        dates.append(dict(scope["headers"])[b"date"])
        if len(dates) > 1:
            return await app(scope, receive, send)
        kind = "https://iana.org/assignments/http-problem-types#date"
        headers = [(b"content-type", b"application/problem+json"), (b"date", formatdate(theirs, usegmt=True).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"type": kind, "status": 400}).encode()})

    async with serving(Gateway(Relay(strict))) as gateway:
        ran = await chat(gateway)
    assert ran.totals is not None, ran.error
    assert ran.totals["attempts"] == 2
    assert dates[1].decode() in {formatdate(theirs + late, usegmt=True) for late in range(-1, 30)}


async def test_an_error_of_the_api_is_told() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        error = {"error": {"message": "no such thing", "type": "invalid_request_error"}}
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(error).encode()})

    async with serving(Gateway(Relay(fails))) as gateway:
        ran = await chat(gateway)
    assert ran.error == {"error": "ApiError", "message": "404: no such thing", "type": "invalid_request_error"}


async def events(send: Any, *datas: str) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for i, data in enumerate(datas, 1):
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": i < len(datas)})


PIECE = json.dumps({"choices": [{"index": 0, "delta": {"content": "one"}}]})
BROKEN = json.dumps({"error": {"message": "the engine failed", "type": "server_error"}})


@pytest.mark.parametrize(
    ("datas", "error"), [((PIECE,), "TruncatedError"), ((PIECE, BROKEN), "ApiError"), ((PIECE, "{"), "MalformedError")]
)
async def test_a_stream_that_does_not_end_well(datas: tuple[str, ...], error: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await events(send, *datas)

    async with serving(Gateway(Relay(app))) as gateway:
        ran = await chat(gateway)
    assert ran.pieces == ["one"]
    assert ran.error is not None
    assert ran.error["error"] == error


async def test_another_media_type_is_not_read() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response | None:
        return served(200, b"{}", {"content-type": "application/json"}) if request.url.path == "/v1/sealed" else None

    async with serving(Gateway(Relay(ChatApp(), respond=respond))) as gateway:
        ran = await chat(gateway)
    assert ran.error is not None
    assert ran.error["error"] == "TransportError"
