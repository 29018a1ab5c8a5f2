"""Absent is None alone: what is empty never stands for what the environment says, wherever it is given."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lacre
import lacre.legacy
from lacre import direct, proxy
from lacre.cli import app
from lacre.cli.chat import sampling
from lacre.client import fetch_manifest
from lacre.trust.chain import Trusted
from parts.relay import AsyncWire, Relay, Wire

CLIENTS = [lacre.Client, lacre.AsyncClient, lacre.OpenAI, lacre.AsyncOpenAI, lacre.legacy.Client, lacre.legacy.AsyncClient]
BLANK = ["", " ", "\n\t"]
PIN, HERE = "A" * 43, "http://127.0.0.1:9"
DIRECT = [direct.Client, direct.AsyncClient]


@pytest.fixture(autouse=True)
def of_the_service(monkeypatch: pytest.MonkeyPatch, relay: Relay, tmp_path: Path) -> None:
    """The environment of a service that has an identity of its own."""
    for name, value in {"LACRE_URL": relay.url, "LACRE_TOKEN": "of-the-service", "XDG_STATE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("make", CLIENTS, ids=lambda make: f"{make.__module__}.{make.__name__}")
class TestEveryClient:
    @pytest.mark.parametrize("blank", BLANK)
    @pytest.mark.parametrize("name", ["token", "url", "pool", "verify", "proxy", "shape"])
    def test_an_empty_argument_is_a_mistake(self, make: Callable[..., Any], name: str, blank: str) -> None:
        with pytest.raises(lacre.UsageError, match=name):
            make(**{name: blank})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("token", b"t"), ("token", 0), ("token", False), ("token", ()), ("url", 3), ("url", b"lacre://x"), ("pool", None),
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


@pytest.mark.parametrize("seconds", [-1.0, 0, float("nan"), float("inf"), "9", True])
@pytest.mark.parametrize("make", [lacre.Client, lacre.AsyncClient])
def test_a_time_limit(make: Callable[..., Any], seconds: object) -> None:
    with pytest.raises(lacre.UsageError, match=r"^timeout"):
        make(timeout=seconds)


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

    @pytest.mark.parametrize("name", ["token_url", "client_id", "client_secret", "scope", "audience"])
    def test_credentials(self, name: str) -> None:
        whole = {"token_url": "https://issuer.example/token", "client_id": "a", "client_secret": "s3cret"}
        with pytest.raises(lacre.UsageError, match=name) as caught:
            lacre.ClientCredentials(**{**whole, name: " "})
        assert "s3cret" not in str(caught.value)


DOORS: list[tuple[str, Callable[[str], Any]]] = [
    ("url", fetch_manifest),
    *(("url", partial(make, key=PIN)) for make in DIRECT),
    *(("key", lambda blank, make=make: make(HERE, key=blank)) for make in DIRECT),
    *(("token", lambda blank, make=make: make(HERE, key=PIN, token=blank)) for make in DIRECT),
    ("key", partial(proxy.ProxyAccess.on, 80)),
    ("name", lambda blank: proxy.ProxyAccess.on(80, "k" * 40, names=[blank])),
    ("origin", lambda blank: proxy.ProxyAccess.on(80, "k" * 40, origins=[blank])),
]


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
        with pytest.raises(lacre.UsageError, match=name):
            call(blank)

    @pytest.mark.parametrize("command", [["chat", "hi"], ["ask", "hi"], ["status"], ["proxy"], ["manifest", "show"]])
    def test_an_option_of_the_command(self, command: list[str]) -> None:
        result = CliRunner().invoke(app, [*command, "--url", ""])
        assert isinstance(result.exception, lacre.UsageError)
        assert "LACRE_URL is used only if" in str(result.exception)

    def test_an_option_that_is_empty_was_given_all_the_same(self) -> None:
        assert sampling("", 3, None) == {"max_tokens": 3, "model": ""}


@pytest.mark.parametrize("value", ["", None])
@pytest.mark.parametrize("variable", ["LACRE_URL", "LACRE_TOKEN", "LACRE_DPOP_KEY"])
def test_a_variable_that_is_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, value)
    needed = pytest.raises(lacre.SettingsError, match=variable)
    with contextlib.nullcontext() if variable == "LACRE_DPOP_KEY" else needed:
        lacre.Client().close()
