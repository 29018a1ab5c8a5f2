"""Every public function of the SDK with odd arguments: it answers, or raises a LacreError that says what to do. Nothing else.

The functions are found by walking what is public, and their arguments by their signatures: a new one is covered unasked. A
class whose methods need an instance has its sample in `Samples`; a new class without one fails here until it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lacre
import lacre.asgi
import lacre.direct
import lacre.legacy
from lacre.client import fetch_manifest
from lacre.jose.jws import b64u
from parts.chat_app import ChatApp
from parts.odd import calls, outcome
from parts.relay import AsyncWire, Relay, Wire, connect, connect_async, served

DOORS: Final[dict[str, Any]] = {
    **{f"lacre.{name}": getattr(lacre, name) for name in lacre.__all__},
    **{f"lacre.{door.__name__.rpartition('.')[2]}.{name}": getattr(door, name)
       for door in (lacre.direct, lacre.legacy) for name in ("Client", "AsyncClient")},
    **{f"lacre.asgi.{name}": getattr(lacre.asgi, name) for name in ("Sealed", "key_file", "pin")},
    "lacre.client.fetch_manifest": fetch_manifest,
}  # fmt: skip
# httpx2 warns of what it will not take for long.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ORDINARY: Final = 12  # calls of each function; `slow` makes more
MANY: Final = 50


ABSENT: Final = httpx2.MockTransport(lambda _request: served(404))  # where no sealed app is, for either kind of client


class Samples:
    """A gateway and a worker in memory, and one sample of each class that has methods, or properties that could fail."""

    def __init__(self, folder: Path) -> None:
        relay = Relay(ChatApp())
        client, later = connect(relay, retries=0), connect_async(relay, retries=0)
        reply, key = client.chat("Hello."), b64u(b"p" * 32)
        self.client = client
        self.usual = {
            "url": relay.url, "token": "t0ken", "messages": "Hello.", "token_url": "https://issuer.example/token",
            "client_id": "id", "client_secret": "secret", "message": "what happened", "status": 403, "problem": "forbidden",
            "code": "x", "type": "x", "key": key, "path": folder / "file", "folder": folder, "method": "POST", "text": "x",
            "request": client.build_request("GET", "/v1/models"), "root": b"r" * 32, "base_url": "https://gateway.example",
            "app": relay.app, "keys": relay.key, "config": relay.key.config,
        }  # fmt: skip
        httpxs = {"token": "t", "memory": lacre.VersionMemory(), "retries": 0}
        self.made: dict[type, Callable[[], Any]] = {
            lacre.Client: lambda: client,
            lacre.AsyncClient: lambda: later,
            lacre.Reply: lambda: reply,
            lacre.Choice: lambda: reply.choices[0],
            lacre.Attribution: lambda: lacre.Attribution(
                "e", "m", "Oslo", -1.0, (), (), None, reply.usage, 1, reply.receipt, reply.audit, reply.verification, {}
            ),
            lacre.Lens: lambda: lacre.Lens((), ()),
            lacre.EmbedReply: lambda: lacre.EmbedReply("m", (), reply.usage, 1, reply.receipt, reply.audit, reply.verification),
            lacre.RerankReply: lambda: lacre.RerankReply((), reply.usage, 1, reply.receipt, reply.audit, reply.verification),
            lacre.TokenizeReply: lambda: lacre.TokenizeReply((1, 2), 512, reply.verification),
            lacre.OwnUsage: lambda: lacre.OwnUsage(None, "USD", ()),
            lacre.UsedLimit: lambda: lacre.UsedLimit("tokens_per_day", "user", "tokens", 9, 4, 5, 86400.0),
            lacre.LensToken: lambda: lacre.LensToken("a", (1,), (1.0,), ("a",)),
            lacre.ChatStream: lambda: client.chat_stream("Hello."),
            lacre.AsyncChatStream: lambda: later.chat_stream("Hello."),
            lacre.AuditProof: lambda: reply.audit,
            lacre.Receipt: lambda: reply.receipt,
            lacre.Verification: lambda: reply.verification,
            lacre.TokenUsage: lambda: reply.usage,
            lacre.Recount: reply.recount,
            lacre.ToolCall: lambda: lacre.ToolCall("c", "f", "{}"),
            lacre.ProofKey: lacre.ProofKey.generate,
            lacre.ClientCredentials: lambda: lacre.ClientCredentials("https://issuer.example/token", "id", "secret"),
            lacre.VersionMemory: lacre.VersionMemory,
            lacre.VersionFile: lambda: lacre.VersionFile(folder / "seen"),
            lacre.legacy.Client: lambda: lacre.legacy.Client(relay.url, transport=Wire(relay), **httpxs),
            lacre.legacy.AsyncClient: lambda: lacre.legacy.AsyncClient(relay.url, transport=AsyncWire(relay), **httpxs),
            lacre.direct.Client: lambda: lacre.direct.Client("http://a.example", key=key, transport=ABSENT),
            lacre.direct.AsyncClient: lambda: lacre.direct.AsyncClient("http://a.example", key=key, transport=ABSENT),
            lacre.asgi.Sealed: lambda: lacre.asgi.Sealed(relay.app, keys=relay.key),
        }


# What a sealed client has of httpx2, or httpx, and does anew.
VERBS: Final = ("get", "options", "head", "post", "put", "patch", "delete", "request", "stream")


def own(kind: type) -> Iterator[str]:
    """The public methods and properties of a class that are ours, and not what a library brought."""
    if issubclass(kind, httpx.Client | httpx.AsyncClient | httpx2.Client | httpx2.AsyncClient):
        yield from VERBS
    for name in dir(kind):
        owner = next(each for each in kind.__mro__ if name in vars(each))
        member = vars(owner)[name]
        is_field = inspect.isdatadescriptor(member) and not isinstance(member, property)
        if not name.startswith("_") and owner.__module__.startswith("lacre") and not is_field:
            yield name


# Made by `chat_stream` alone: what it gives them is not the program's.
MADE_BY_US: Final = ("lacre.ChatStream", "lacre.AsyncChatStream")


def targets() -> list[str]:
    """Each public function, constructor and method, by name."""
    found = []
    for name, value in DOORS.items():
        if isinstance(value, enum.EnumMeta):
            continue
        if callable(value) and name not in MADE_BY_US:
            found.append(name)
        if inspect.isclass(value) and not issubclass(value, BaseException):
            found += [f"{name}:{member}" for member in own(value)]
    return found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    folder = tmp_path_factory.mktemp("samples")
    with contextlib.chdir(folder):  # where an odd text is taken for the name of a file
        yield Samples(folder)


def found(samples: Samples, target: str) -> Callable[..., Any]:
    name, _, member = target.partition(":")
    value = DOORS[name]
    if not member:
        return value  # type: ignore[no-any-return]
    static = inspect.getattr_static(value, member)
    if isinstance(static, classmethod | staticmethod):
        return getattr(value, member)  # type: ignore[no-any-return]
    sample = samples.made[value]()
    if isinstance(static, property):
        return lambda: getattr(sample, member)
    return getattr(sample, member)  # type: ignore[no-any-return]


@pytest.mark.parametrize("examples", [ORDINARY, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", targets())
def test_nothing_but_our_errors(samples: Samples, target: str, examples: int) -> None:
    called = 0
    signed = found(samples, target)
    if inspect.isclass(signed) and issubclass(signed, BaseException) and signed.__init__ is Exception.__init__:
        return

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal called
        function = found(samples, target)
        signature = function.__init__ if inspect.isclass(function) and not _has_signature(function) else function
        positional, named = data.draw(calls(signature, samples.usual))
        called += 1
        try:
            came = outcome(function, positional, named)
        except lacre.LacreError as exc:
            assert exc.remedy, repr(exc)
            assert str(exc).strip() or (target.startswith("lacre.") and inspect.isclass(function)), repr(exc)
        else:
            _close(came)

    run()
    assert called


def _has_signature(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function)
    except ValueError:
        return False
    return True


def _close(came: object) -> None:
    for name in ("aclose", "close") if type(came).__module__.startswith(("lacre", "openai")) else ():
        if callable(end := getattr(came, name, None)):
            if inspect.isawaitable(ended := end()):
                asyncio.run(_awaited(ended))
            return


async def _awaited(ended: Any) -> None:
    await ended


def test_the_usual_call_answers(samples: Samples) -> None:
    """So that the tests above do not all end at a check of their own making."""
    assert samples.client.chat("Hello.").text == "one two three"
    assert list(samples.client.chat_stream("Hello.")) == ["one ", "two ", "three"]
