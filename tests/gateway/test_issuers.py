"""Keys that an issuer publishes: fetched from a real server on loopback that does whatever a test asks of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.auth import fetch, jwks_remote
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.auth.jwks_remote import WELL_KNOWN, KeysUnavailable, RemoteKeys, Timing
from lacre_gateway.settings import fetchable
from parts.stage import until

QUICK = Timing(least=60.0, default=60.0, retry=0.02, patience=0.05, cooldown=0.05, stale_limit=3600.0)
OFTEN = replace(QUICK, least=0.02, default=0.02, cooldown=0.01)


@dataclass
class Room:
    """An issuer's HTTP server, and whatever reads its keys, which is closed after the test.

    documents: what is served where; headers: with each. status: of the next answers, which wait for the gate.
    """

    port: int = 0
    documents: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    etags: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)
    unchanged: int = 0  # how often it said so, with a 304
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    running: set[Any] = field(default_factory=set)
    log: io.StringIO = field(default_factory=io.StringIO)
    opened: list[RemoteKeys] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self.gate.set()
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        self.documents.setdefault(WELL_KNOWN, {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"})

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
            if f"if-none-match: {headers['etag']}" in request.lower():
                status, content = 304, b""
                self.unchanged += 1
                del headers["content-length"]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + content

    def keys(self, timing: Timing = QUICK, address: str | None = None, issuer: str | None = None) -> RemoteKeys:
        log = make_log(self.log)
        keys = RemoteKeys(issuer or self.url, address, ("EdDSA",), place="issuers.0", log=log, timing=timing)
        self.opened.append(keys)
        return keys

    async def started(self, timing: Timing = QUICK, **where: str) -> RemoteKeys:
        """Keys that were read, of an issuer that publishes `a` where the test says nothing else."""
        if "/jwks" not in self.documents:
            self.publish(a=A)
        keys = self.keys(timing, **where)
        keys.start()
        await until(lambda: keys.usable)
        return keys

    def reasons(self) -> str:
        return " ".join(json.loads(line).get("reason", "") for line in self.log.getvalue().splitlines())


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room()
    await room.open()
    yield room
    for keys in room.opened:
        await keys.close()
    await room.close()


A, B, C = (Ed25519PrivateKey.generate() for _ in range(3))


def knows(keys: RemoteKeys, kid: str, key: Ed25519PrivateKey) -> bool:
    found = keys.find(kid, "EdDSA")
    return found is not None and bool(found.key == key.public_key())


@pytest.mark.parametrize("discovered", [True, False])
async def test_where_the_keys_are(discovered: bool, room: Room) -> None:
    keys = await room.started(**{} if discovered else {"address": f"{room.url}/jwks", "issuer": "urn:any"})
    assert knows(keys, "a", A)
    assert room.asked == ([WELL_KNOWN, "/jwks"] if discovered else ["/jwks"])


async def test_a_new_key_is_found_by_the_first_tokens_that_name_it_and_many_ask_once(room: Room) -> None:
    keys = await room.started()
    room.publish(b=B, a=A)
    room.asked.clear()
    assert keys.find("b", "EdDSA") is None
    found = await asyncio.gather(*(keys.seek("b", "EdDSA") for _ in range(50)))
    assert all(key is not None and key.key == B.public_key() for key in found)
    assert (room.asked, knows(keys, "a", A), keys.epoch) == (["/jwks"], True, 0)


async def test_unknown_names_ask_once_per_cooldown(room: Room) -> None:
    keys = await room.started(replace(QUICK, cooldown=0.3))
    room.asked.clear()
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < began + 1.0:
        assert await keys.seek("nobody", "EdDSA") is None
    assert 1 <= len(room.asked) <= 5


async def test_a_key_that_came_while_the_old_set_was_on_its_way_is_found(room: Room) -> None:
    keys = await room.started()
    room.arrived.clear()
    room.gate.clear()
    first = asyncio.create_task(keys.seek("nobody", "EdDSA"))
    await room.arrived.wait()  # the set without b is as good as sent
    room.publish(b=B)
    second = asyncio.create_task(keys.seek("b", "EdDSA"))
    await asyncio.sleep(0)
    room.gate.set()
    assert (await second).key == B.public_key()
    assert await first is None


async def test_waiting_is_bounded(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks_remote, "MAX_WAITING", 2)
    keys = await room.started()
    room.gate.clear()
    waiting = [asyncio.create_task(keys.seek("b", "EdDSA")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    room.gate.set()
    assert await asyncio.gather(*waiting) == [None, None]


async def test_keys_outlive_an_outage_and_an_issuer_that_is_back_is_read(room: Room) -> None:
    keys = await room.started(OFTEN)
    await room.close()
    await until(lambda: "cannot be reached" in room.reasons())
    assert knows(keys, "a", A)
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    room.publish(a=A, b=B)
    await room.open()
    await until(lambda: keys.find("b", "EdDSA"))
    assert keys.epoch == 0


async def test_keys_do_not_outlive_the_ceiling(room: Room) -> None:
    keys = await room.started(replace(OFTEN, stale_limit=0.5))
    room.status = 503
    await until(lambda: not keys.usable)
    assert keys.find("a", "EdDSA") is None
    assert keys.epoch == 1  # what was remembered of their tokens is over, too
    room.status = 200
    await until(lambda: knows(keys, "a", A))
    keys._good_until = 0.0  # past their time, though nobody has dropped them yet
    assert keys.find("a", "EdDSA") is None


PRIVATE = OKPAlgorithm.to_jwk(B, as_dict=True)
USABLE = {"kty": "OKP", "crv": "Ed25519", "x": PRIVATE["x"], "kid": "b"}
# By name, the status of an answer and its document.
NO_SET: dict[str, tuple[int, Any]] = {
    **{str(status): (status, {"keys": [USABLE]}) for status in (204, 301, 302, 307, 308, 401, 404, 500, 503)},
    "empty": (200, {"keys": []}),
    "no set": (200, {}),
    "a list": (200, []),
    "not JSON": (200, b"<html>"),
    "no UTF-8": (200, b"\xff\xfe"),
    "nested without end": (200, b"[" * 100_000),
    "with a private key": (200, {"keys": [{**PRIVATE, "kid": "b"}]}),
    "with a symmetric key": (200, {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "b"}]}),
    "no key that is pinned": (200, {"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "b"}]}),
    "a key that is none": (200, {"keys": [{**USABLE, "x": "!"}]}),
    "too many": (200, {"keys": [{**USABLE, "kid": f"{n}"} for n in range(101)]}),
    "too long": (200, json.dumps({"keys": [USABLE]}).encode() + b" " * fetch.MAX_DOCUMENT),
}


@pytest.mark.parametrize("name", NO_SET)
async def test_an_answer_that_cannot_be_used_replaces_no_set(name: str, room: Room) -> None:
    """Nor is a redirect followed, the issuer's own word: and a tag of what was thrown away is not sent back, to be told 304."""
    keys = await room.started()
    room.documents["/elsewhere"] = {"keys": [USABLE]}
    room.etags, room.headers = True, {"location": f"{room.url}/elsewhere"}
    room.status, room.documents["/jwks"] = NO_SET[name]
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            await keys.seek("b", "EdDSA")
    assert knows(keys, "a", A)
    assert keys.epoch == 0 and "/elsewhere" not in room.asked
    assert room.reasons() and str(PRIVATE["d"]) not in room.log.getvalue()


async def test_an_issuer_that_hangs_holds_nobody_for_long(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIME_LIMIT", 0.2)
    keys = await room.started()
    room.gate.clear()
    with pytest.raises(KeysUnavailable):
        await keys.seek("b", "EdDSA")
    assert "took longer" in room.reasons() or "cannot be reached" in room.reasons()


@pytest.mark.parametrize(
    "metadata",
    [
        [], {"jwks_uri": "{url}/jwks"}, {"issuer": "{url}"}, {"issuer": "http://127.0.0.1:1", "jwks_uri": "{url}/jwks"},
        {"issuer": "{url}/", "jwks_uri": "{url}/jwks"}, {"issuer": "{url}", "jwks_uri": 7},
        {"issuer": "{url}", "jwks_uri": "http://192.0.2.1/jwks"}, {"issuer": "{url}", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "{url}", "jwks_uri": "https://user:password@127.0.0.1/jwks"},
    ],
)  # fmt: skip
async def test_metadata_of_somebody_else_is_not_believed(metadata: Any, room: Room) -> None:
    room.publish(a=A)
    room.documents[WELL_KNOWN] = json.dumps(metadata).replace("{url}", room.url).encode()
    keys = room.keys()
    with pytest.raises(KeysUnavailable):
        await keys.seek("a", "EdDSA")
    assert not keys.usable
    assert room.asked == [WELL_KNOWN]


@pytest.mark.parametrize(
    ("control", "age", "looks"),
    [
        ("max-age=3600", "0", 1), ("public, max-age=3600, must-revalidate", "0", 1), ("max-age=3600", "3600", 3),
        ("max-age=0", "0", 3), ("no-store", "0", 3), ("no-cache", "0", 3),
    ],
)  # fmt: skip
async def test_cache_headers_are_honoured(control: str, age: str, looks: int, room: Room) -> None:
    """Over half a second, with a look each tenth where the issuer asks for it."""
    room.headers = {"cache-control": control, "age": age}
    await room.started(replace(QUICK, least=0.1, cooldown=0.01))
    room.asked.clear()
    if looks > 1:
        await until(lambda: room.asked.count("/jwks") >= looks)
    else:
        await asyncio.sleep(0.5)
        assert room.asked == []


@pytest.mark.parametrize("tag", [None, "\u00ff\u20ac"])
async def test_a_set_that_is_the_same_is_not_sent_again(tag: str | None, room: Room) -> None:
    """Nor is a tag sent back that came off the wire as bytes that no header may hold."""
    room.etags = tag is None
    room.headers = {} if tag is None else {"etag": tag}
    keys = await room.started()
    assert await keys.seek("b", "EdDSA") is None
    assert knows(keys, "a", A) and room.unchanged == int(room.etags)
    room.publish(b=B)
    await keys.seek("b", "EdDSA")
    assert knows(keys, "b", B) and room.reasons() == ""


@pytest.mark.parametrize("odd", [{"kid": ["b"]}, {"crv": ["Ed25519"]}, {"x": 1}, {"alg": {}}], ids=repr)
async def test_an_odd_key_takes_no_other_along_and_ends_no_keeper(odd: dict[str, Any], room: Room) -> None:
    """RFC 7517 section 5. The log says what is wrong with it, once; and the next look withdraws a key."""
    keys = await room.started(OFTEN)
    room.publish(a=A, c=C)
    room.documents["/jwks"]["keys"].insert(1, {**USABLE, **odd})
    looks = len(room.asked)
    await until(lambda: len(room.asked) > looks + 2)
    assert knows(keys, "a", A) and knows(keys, "c", C)
    assert await keys.seek("b", "EdDSA") is None
    assert room.reasons().count("key 1") == 1
    room.publish(b=B)
    await until(lambda: knows(keys, "b", B))
    assert (keys.find("a", "EdDSA"), keys.epoch) == (None, 1)


@pytest.mark.parametrize("after", [{"b": B}, {"a": C}, {"a": C, "b": B}])
async def test_a_key_that_is_withdrawn_says_so(after: dict[str, Ed25519PrivateKey], room: Room) -> None:
    keys = await room.started()
    room.publish(**after)
    await keys.seek("nobody", "EdDSA")
    assert keys.epoch == 1


@pytest.mark.parametrize(
    ("expected", "plain", "urls"),
    [
        (True, False, ["https://issuer.example/x", "https://issuer.example:8443/x?y=z"]),
        (True, True, ["http://127.0.0.1:8080/x", "http://localhost/x", "http://[::1]/x"]),
        (False, True, ["http://issuer.example/x", "http://127.0.0.1.example/x", "ftp://issuer.example/x", "issuer", ""]),
        (False, False, ["http://127.0.0.1/x", "https://user@issuer.example/x", "https://issuer.example/x#y",
                        "https://issuer.example:port/", "https:///x"]),
    ],
)  # fmt: skip
def test_where_documents_may_be(expected: bool, plain: bool, urls: list[str]) -> None:
    assert [url for url in urls if fetchable(url, plain=plain) is not expected] == []


ODD = (None, True, 0, -1, 1.5, "", "A", "=", "A" * 43, "A" * 5000, "ß", "\ud800", [], ["a"], {}, {"a": 1})
GOOD: dict[str, dict[str, Any]] = {
    "OKP": {**USABLE, "alg": "EdDSA"},
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


@pytest.mark.parametrize(
    ("kty", "name", "value"),
    [
        *(("OKP", name, value) for name in ("kid", "crv", "alg", "kty", "x", "use") for value in (["a"], {"a": 1}, 7)),
        pytest.param("RSA", "n", "u" * 20_000, id="a number of a hundred thousand bits, before it is one"),
    ],
)
def test_a_member_that_must_be_text_is_named(kty: str, name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"key 0: {name} must be text of at most"):
        KeySet.parse({"keys": [{**GOOD[kty], name: value}]}, ALL, "place")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSL_CERT_FILE", "/nowhere/at/all.pem"), ("SSL_CERT_FILE", __file__), ("ALL_PROXY", "socks://127.0.0.1:1"),
        ("HTTPS_PROXY", "nonsense://"), ("HTTPS_PROXY", "http://["),
    ],
)  # fmt: skip
async def test_an_environment_that_gives_no_client_is_a_failed_look(
    variable: str, value: str, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    keys = room.keys(issuer="https://127.0.0.1:1")
    keys.start()
    await until(lambda: len(room.log.getvalue().splitlines()) >= 1)
    with pytest.raises(KeysUnavailable):
        await keys.seek("a", "EdDSA")
    assert "unexpected" not in room.reasons()
    monkeypatch.delenv(variable)
    keys._address = f"{room.url}/jwks"  # the operator corrects what is wrong, and the next look succeeds
    keys._client = None
    room.publish(a=A)
    await until(lambda: knows(keys, "a", A))


async def test_whatever_a_look_raises_is_a_failed_look(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of our own code, say: it is logged whole, and the next look comes."""
    room.publish(a=A)
    keys = room.keys()
    keys._algorithms = None  # type: ignore[assignment]
    keys.start()
    await until(lambda: "unexpected" in room.reasons())
    assert caplog.messages[0] == "a try failed: issuer keys"
    keys._algorithms = ("EdDSA",)
    await until(lambda: knows(keys, "a", A))
