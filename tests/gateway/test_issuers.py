"""Keys that an issuer publishes: fetched from a real server on loopback that does whatever a test asks of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.auth import fetch, jwks_remote
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.auth.jwks_remote import KeysUnavailable, RemoteKeys, Timing
from lacre_gateway.settings import fetchable

QUICK = Timing(least=60.0, default=60.0, retry=0.02, patience=0.05, cooldown=0.05, stale_limit=3600.0)
DISCOVERY = "/.well-known/openid-configuration"


@dataclass
class Issuer:
    """An HTTP server. documents: what is served where; headers: with each. status, hang: of the next answers."""

    port: int = 0
    documents: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    etags: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self.gate.set()
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        self.documents.setdefault(DISCOVERY, {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"})

    async def close(self) -> None:
        self.server.close()
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    def publish(self, **keys: Ed25519PrivateKey) -> None:
        members = [{**OKPAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid} for kid, key in keys.items()]
        self.documents["/jwks"] = {"keys": members}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                writer.write(await self._answer(request.decode()))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.running.discard(task)

    async def _answer(self, request: str) -> bytes:
        path = request.split(" ")[1]
        self.asked.append(path)
        self.arrived.set()
        document, status = self.documents.get(path, {}), self.status
        await self.gate.wait()
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        headers = {**self.headers, "content-length": str(len(content))}
        if self.etags:
            headers["etag"] = f'"{hash(content)}"'
            if f"if-none-match: {headers['etag']}" in request.lower().replace("If-None-Match", "if-none-match"):
                status, content = 304, b""
                del headers["content-length"]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + content


@dataclass
class Room:
    """An issuer, and whatever reads its keys, which is closed after the test."""

    issuer: Issuer
    log: io.StringIO = field(default_factory=io.StringIO)
    opened: list[RemoteKeys] = field(default_factory=list)

    def keys(self, timing: Timing = QUICK, address: str | None = None, issuer: str | None = None) -> RemoteKeys:
        log = make_log(self.log)
        keys = RemoteKeys(issuer or self.issuer.url, address, ("EdDSA",), place="issuers.0", log=log, timing=timing)
        self.opened.append(keys)
        return keys

    async def started(self, timing: Timing = QUICK, **where: str) -> RemoteKeys:
        keys = self.keys(timing, **where)
        keys.start()
        async with asyncio.timeout(10):
            while not keys.usable:
                await asyncio.sleep(0.005)
        return keys

    def reasons(self) -> str:
        return " ".join(json.loads(line).get("reason", "") for line in self.log.getvalue().splitlines())


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    issuer = Issuer()
    await issuer.open()
    room = Room(issuer)
    yield room
    for keys in room.opened:
        await keys.close()
    await issuer.close()


A, B, C = (Ed25519PrivateKey.generate() for _ in range(3))


def is_key(found: jwt.PyJWK | None, key: Ed25519PrivateKey) -> bool:
    return found is not None and bool(found.key == key.public_key())


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_discovery_finds_the_keys(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    assert is_key(keys.find("a", "EdDSA"), A)
    assert room.issuer.asked == [DISCOVERY, "/jwks"]


async def test_an_address_needs_no_discovery(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started(address=f"{room.issuer.url}/jwks", issuer="urn:any")
    assert is_key(keys.find("a", "EdDSA"), A)
    assert room.issuer.asked == ["/jwks"]


async def test_a_new_key_is_found_by_the_first_token_that_names_it(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.publish(b=B, a=A)
    assert keys.find("b", "EdDSA") is None
    assert is_key(await keys.seek("b", "EdDSA"), B)
    assert is_key(keys.find("a", "EdDSA"), A)
    assert keys.epoch == 0


async def test_many_tokens_ask_once(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.publish(b=B)
    room.issuer.asked.clear()
    found = await asyncio.gather(*(keys.seek("b", "EdDSA") for _ in range(50)))
    assert all(is_key(key, B) for key in found)
    assert room.issuer.asked == ["/jwks"]


async def test_unknown_names_ask_once_per_cooldown(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started(Timing(cooldown=0.3))
    room.issuer.asked.clear()
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < began + 1.0:
        assert await keys.seek("nobody", "EdDSA") is None
    assert 1 <= len(room.issuer.asked) <= 5


async def test_a_key_that_came_while_the_old_set_was_on_its_way_is_found(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.arrived.clear()
    room.issuer.gate.clear()
    first = asyncio.create_task(keys.seek("nobody", "EdDSA"))
    await room.issuer.arrived.wait()  # the set without b is as good as sent
    room.issuer.publish(b=B)
    second = asyncio.create_task(keys.seek("b", "EdDSA"))
    await asyncio.sleep(0)
    room.issuer.gate.set()
    assert is_key(await second, B)
    assert await first is None


async def test_waiting_is_bounded(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks_remote, "MAX_WAITING", 2)
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.gate.clear()
    waiting = [asyncio.create_task(keys.seek("b", "EdDSA")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    room.issuer.gate.set()
    assert await asyncio.gather(*waiting) == [None, None]


async def test_keys_outlive_an_outage_and_an_issuer_that_is_back_is_read(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started(Timing(least=0.02, default=0.02, retry=0.02, patience=0.05, cooldown=0.01))
    await room.issuer.close()
    await until(lambda: "cannot be reached" in room.reasons())
    assert is_key(keys.find("a", "EdDSA"), A)
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    room.issuer.publish(a=A, b=B)
    await room.issuer.open()
    await until(lambda: keys.find("b", "EdDSA"))
    assert keys.epoch == 0


async def test_keys_do_not_outlive_the_ceiling(room: Room) -> None:
    room.issuer.publish(a=A)
    timing = Timing(least=0.02, default=0.02, retry=0.02, patience=0.05, cooldown=0.01, stale_limit=0.5)
    keys = await room.started(timing)
    room.issuer.status = 503
    await until(lambda: not keys.usable)
    assert keys.find("a", "EdDSA") is None
    assert keys.epoch == 1  # what was remembered of their tokens is over, too
    room.issuer.status = 200
    await until(lambda: keys.usable)
    assert is_key(keys.find("a", "EdDSA"), A)


PRIVATE = OKPAlgorithm.to_jwk(B, as_dict=True)
POISON = {
    "empty": {"keys": []},
    "no set": {},
    "a list": [],
    "not JSON": b"<html>",
    "no UTF-8": b"\xff\xfe",
    "nested without end": b"[" * 100_000,
    "with a private key": {"keys": [{**PRIVATE, "kid": "b"}]},
    "with a symmetric key": {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "b"}]},
    "no key that is pinned": {"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "b"}]},
    "a key that is none": {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "!", "kid": "b"}]},
    "too many": {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": PRIVATE["x"], "kid": f"{n}"} for n in range(101)]},
    "too long": json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": PRIVATE["x"], "kid": "b"}]}).encode()
    + b" " * fetch.MAX_DOCUMENT,
}


@pytest.mark.parametrize("name", POISON)
async def test_a_set_that_cannot_be_used_replaces_none(name: str, room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.documents["/jwks"] = POISON[name]
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    assert is_key(keys.find("a", "EdDSA"), A)
    assert keys.epoch == 0
    assert room.reasons() and str(PRIVATE["d"]) not in room.log.getvalue()


@pytest.mark.parametrize("status", [204, 301, 302, 307, 308, 401, 404, 500, 503])
async def test_no_other_status_is_a_set(status: int, room: Room) -> None:
    """And a redirect is not followed: the address is the issuer's own word."""
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.publish(b=B)
    room.issuer.documents["/elsewhere"] = room.issuer.documents["/jwks"]
    room.issuer.status, room.issuer.headers = status, {"location": f"{room.issuer.url}/elsewhere"}
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    assert is_key(keys.find("a", "EdDSA"), A)
    assert "/elsewhere" not in room.issuer.asked


async def test_an_issuer_that_hangs_holds_nobody_for_long(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIME_LIMIT", 0.2)
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.gate.clear()
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    assert "took longer" in room.reasons() or "cannot be reached" in room.reasons()


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "http://127.0.0.1:1", "jwks_uri": "{url}/jwks"},
        {"issuer": "{url}/", "jwks_uri": "{url}/jwks"},
        {"jwks_uri": "{url}/jwks"},
        {"issuer": "{url}"},
        {"issuer": "{url}", "jwks_uri": 7},
        {"issuer": "{url}", "jwks_uri": "http://192.0.2.1/jwks"},
        {"issuer": "{url}", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "{url}", "jwks_uri": "https://user:password@127.0.0.1/jwks"},
        [],
    ],
)
async def test_metadata_of_somebody_else_is_not_believed(metadata: Any, room: Room) -> None:
    room.issuer.publish(a=A)
    text = json.dumps(metadata).replace("{url}", room.issuer.url)
    room.issuer.documents[DISCOVERY] = text.encode()
    keys = room.keys()
    with pytest.raises(KeysUnavailable):
        await keys.seek("a", "EdDSA")
    assert not keys.usable
    assert room.issuer.asked == [DISCOVERY]


@pytest.mark.parametrize(
    ("control", "looks"),
    [("max-age=3600", 1), ("public, max-age=3600, must-revalidate", 1), ("max-age=0", 3), ("no-store", 3), ("no-cache", 3)],
)
async def test_cache_headers_are_honoured(control: str, looks: int, room: Room) -> None:
    """Over half a second, with a look each tenth where the issuer asks for it."""
    room.issuer.publish(a=A)
    room.issuer.headers = {"cache-control": control}
    await room.started(Timing(least=0.1, default=60.0, cooldown=0.01))
    room.issuer.asked.clear()
    if looks > 1:
        await until(lambda: room.issuer.asked.count("/jwks") >= looks)
    else:
        await asyncio.sleep(0.5)
        assert room.issuer.asked == []


async def test_age_counts(room: Room) -> None:
    room.issuer.publish(a=A)
    room.issuer.headers = {"cache-control": "max-age=3600", "age": "3599.9"}
    room.issuer.headers["age"] = "3600"
    await room.started(Timing(least=0.05, default=60.0, cooldown=0.01))
    await until(lambda: room.issuer.asked.count("/jwks") >= 3)


async def test_a_set_that_is_the_same_is_not_sent_again(room: Room) -> None:
    room.issuer.publish(a=A)
    room.issuer.etags = True
    keys = await room.started()
    assert await keys.seek("b", "EdDSA") is None  # 304
    assert is_key(keys.find("a", "EdDSA"), A)
    room.issuer.publish(b=B)
    assert is_key(await keys.seek("b", "EdDSA"), B)
    assert room.reasons() == ""


UNUSABLE: list[Any] = [
    "x", 1, None, {"kty": ["OKP"], "kid": "b"},
    {"kty": "OKP", "crv": ["Ed25519"], "x": "AA", "kid": "b"},
    {"kty": "OKP", "crv": "Ed25519", "x": "!", "kid": "b"},
    {"kty": "OKP", "crv": "Ed25519", "x": 1, "kid": "b"},
    {"kty": "OKP", "crv": "Ed25519", "x": "A" * 10_000, "kid": "b"},
    {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": ["b"]},  # RFC 8037, A.2
]  # fmt: skip


@pytest.mark.parametrize("bad", UNUSABLE, ids=str)
async def test_a_key_that_cannot_be_used_takes_no_other_along(bad: Any, room: Room) -> None:
    """RFC 7517 section 5. The log says what is wrong with it, once."""
    room.issuer.publish(a=A, c=C)
    room.issuer.documents["/jwks"]["keys"].insert(1, bad)
    keys = await room.started()
    assert is_key(keys.find("a", "EdDSA"), A) and is_key(keys.find("c", "EdDSA"), C)
    assert await keys.seek("b", "EdDSA") is None
    assert room.reasons().count("key 1") == 1


async def test_a_tag_that_is_none_is_not_sent_back(room: Room) -> None:
    """It came off the wire as bytes that no header may hold."""
    room.issuer.publish(a=A)
    room.issuer.headers["etag"] = "\u00ff\u20ac"
    keys = await room.started()
    room.issuer.publish(a=A, b=B)
    assert is_key(await keys.seek("b", "EdDSA"), B)
    assert room.reasons() == ""


async def test_a_poisoned_set_s_tag_is_not_kept(room: Room) -> None:
    """Or the issuer would be told that its set is known here, which was thrown away."""
    room.issuer.publish(a=A)
    room.issuer.etags = True
    keys = await room.started()
    room.issuer.documents["/jwks"] = {"keys": []}
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            await keys.seek("b", "EdDSA")


@pytest.mark.parametrize("after", [{"b": B}, {"a": C}, {"a": C, "b": B}])
async def test_a_key_that_is_withdrawn_says_so(after: dict[str, Ed25519PrivateKey], room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started()
    room.issuer.publish(**after)
    await keys.seek("nobody", "EdDSA")
    assert keys.epoch == 1


@pytest.mark.parametrize(
    ("url", "plain", "expected"),
    [
        ("https://issuer.example/x", False, True),
        ("https://issuer.example:8443/x?y=z", False, True),
        ("http://issuer.example/x", True, False),
        ("http://127.0.0.1:8080/x", True, True),
        ("http://localhost/x", True, True),
        ("http://[::1]/x", True, True),
        ("http://127.0.0.1/x", False, False),
        ("http://127.0.0.1.example/x", True, False),
        ("https://user@issuer.example/x", False, False),
        ("https://issuer.example/x#y", False, False),
        ("https://issuer.example:port/", False, False),
        ("https:///x", False, False),
        ("ftp://issuer.example/x", True, False),
        ("issuer.example", True, False),
        ("", True, False),
    ],
)
def test_where_documents_may_be(url: str, plain: bool, expected: bool) -> None:
    assert fetchable(url, plain=plain) is expected


ODD = (None, True, 0, -1, 1.5, "", "A", "=", "A" * 43, "A" * 5000, "ß", "\ud800", [], ["a"], {}, {"a": 1})
GOOD = {
    "OKP": {
        "kty": "OKP",
        "crv": "Ed25519",
        "kid": "a",
        "alg": "EdDSA",
        "x": OKPAlgorithm.to_jwk(A.public_key(), as_dict=True)["x"],
    },
    "EC": {"kty": "EC", "crv": "P-256", "kid": "a", "alg": "ES256", "x": "A" * 43, "y": "B" * 43},
    "RSA": {"kty": "RSA", "kid": "a", "alg": "RS256", "n": "u" * 342, "e": "AQAB"},
}
ALL = ("EdDSA", "ES256", "RS256")


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("kty", GOOD)
def test_whatever_a_member_of_a_key_is_the_set_is_read_or_refused(kty: str, value: Any) -> None:
    """A set comes from outside: its reader raises SettingsError, and nothing else."""
    for name in (*GOOD[kty], "use", "key_ops", "x5c", "unknown"):
        try:
            KeySet.parse({"keys": [{**GOOD[kty], name: value}]}, ALL, "place")
        except SettingsError as exc:
            assert "place: " in str(exc)


@pytest.mark.parametrize("name", ["kid", "crv", "alg", "kty", "x", "use"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, 7], ids=repr)
def test_a_member_that_must_be_text_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"key 0: {name} must be text"):
        KeySet.parse({"keys": [{**GOOD["OKP"], name: value}]}, ALL, "place")


def test_a_number_of_a_hundred_thousand_bits_is_refused_before_it_is_one() -> None:
    with pytest.raises(SettingsError, match="n must be text of at most"):
        KeySet.parse({"keys": [{**GOOD["RSA"], "n": "u" * 20_000}]}, ALL, "place")


@pytest.mark.parametrize("odd", [{"kid": ["b"]}, {"crv": ["Ed25519"]}, {"x": 1}, {"alg": {}}], ids=repr)
async def test_an_odd_member_ends_no_keeper_and_the_next_look_withdraws_a_key(odd: dict[str, Any], room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started(Timing(least=0.02, default=0.02, retry=0.02, patience=0.02, cooldown=0.01, stale_limit=3600.0))
    good = room.issuer.documents["/jwks"]["keys"][0]
    room.issuer.documents["/jwks"] = {"keys": [good, {**good, "kid": "b", **odd}]}
    looks = len(room.issuer.asked)
    await until(lambda: len(room.issuer.asked) > looks + 2)
    assert is_key(keys.find("a", "EdDSA"), A)
    room.issuer.publish(c=C)
    await until(lambda: is_key(keys.find("c", "EdDSA"), C))
    assert keys.find("a", "EdDSA") is None
    assert keys.epoch == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"SSL_CERT_FILE": "/nowhere/at/all.pem"},
        {"SSL_CERT_FILE": __file__},
        {"ALL_PROXY": "socks://127.0.0.1:1"},
        {"HTTPS_PROXY": "nonsense://"},
        {"HTTPS_PROXY": "http://["},
    ],
    ids=repr,
)
async def test_an_environment_that_gives_no_client_is_a_failed_look(
    environment: dict[str, str], room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys = room.keys(issuer="https://127.0.0.1:1")
    keys.start()
    await until(lambda: len(room.log.getvalue().splitlines()) >= 1)
    with pytest.raises(KeysUnavailable):
        await keys.seek("a", "EdDSA")
    assert "unforeseen" not in room.reasons()
    for name in environment:
        monkeypatch.delenv(name)
    keys._address = f"{room.issuer.url}/jwks"  # the operator corrects what is wrong, and the next look succeeds
    keys._client = None
    room.issuer.publish(a=A)
    await until(lambda: is_key(keys.find("a", "EdDSA"), A))


async def test_keys_are_not_found_past_their_time_though_nobody_drops_them(room: Room) -> None:
    room.issuer.publish(a=A)
    keys = await room.started(Timing(least=60.0, default=60.0, retry=0.02, patience=0.05, cooldown=0.05, stale_limit=0.05))
    keys._good_until = 0.0
    assert keys.find("a", "EdDSA") is None


async def test_whatever_a_look_raises_is_a_failed_look(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of our own code, say: it is logged whole, and the next look comes."""
    room.issuer.publish(a=A)
    keys = room.keys(issuer=room.issuer.url)
    keys._algorithms = None  # type: ignore[assignment]
    keys.start()
    await until(lambda: "unexpected" in room.reasons())
    assert caplog.messages[0] == "a try failed: issuer keys"
    keys._algorithms = ("EdDSA",)
    await until(lambda: is_key(keys.find("a", "EdDSA"), A))
