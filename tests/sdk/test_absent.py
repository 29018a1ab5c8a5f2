"""Absent is None alone: what is empty never stands for what the environment says, wherever it is given."""

from __future__ import annotations

from collections.abc import Callable
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
PIN = "A" * 43


@pytest.fixture(autouse=True)
def of_the_service(monkeypatch: pytest.MonkeyPatch, relay: Relay, tmp_path: Path) -> None:
    """The environment of a service that has an identity of its own."""
    for name, value in {"LACRE_URL": relay.url, "LACRE_TOKEN": "of-the-service", "XDG_STATE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def used(relay: Relay) -> set[str]:
    return {request.headers.get("authorization", "") for request in relay.requests if request.url.path == "/v1/sealed"}


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
        with lacre.Client(token=lambda: given, transport=Wire(relay)) as client, pytest.raises(lacre.UsageError, match="token"):
            client.chat("x")
        assert used(relay) == set()

    @pytest.mark.parametrize("given", [*BLANK, None, b"t"])
    async def test_an_async_one(self, relay: Relay, given: Any) -> None:
        async def ask() -> Any:
            return given

        async with lacre.AsyncClient(token=ask, transport=AsyncWire(relay)) as client:
            with pytest.raises(lacre.UsageError, match="token"):
                await client.chat("x")
        assert used(relay) == set()

    def test_an_async_callable_for_a_sync_client(self, relay: Relay) -> None:
        async def ask() -> str:
            return "t"

        with lacre.Client(token=ask, transport=Wire(relay)) as client:  # type: ignore[arg-type]
            with pytest.raises(lacre.UsageError, match="AsyncClient"):
                client.chat("x")
        assert used(relay) == set()

    def test_none_is_the_services_own(self, relay: Relay) -> None:
        with lacre.Client(transport=Wire(relay)) as client:
            client.chat("x")
        assert used(relay) == {"Bearer of-the-service"}

    @pytest.mark.parametrize("name", ["token_url", "client_id", "client_secret", "scope", "audience"])
    def test_credentials(self, name: str) -> None:
        whole = {"token_url": "https://issuer.example/token", "client_id": "a", "client_secret": "s3cret"}
        with pytest.raises(lacre.UsageError, match=name) as caught:
            lacre.ClientCredentials(**{**whole, name: " "})
        assert "s3cret" not in str(caught.value)


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
    def test_other_doors(self, blank: str) -> None:
        with pytest.raises(lacre.UsageError, match="url"):
            fetch_manifest(blank)
        for make in (direct.Client, direct.AsyncClient):
            with pytest.raises(lacre.UsageError, match="url"):
                make(blank, key=PIN)
            with pytest.raises(lacre.UsageError, match="key"):
                make("http://127.0.0.1:9", key=blank)
            with pytest.raises(lacre.UsageError, match="token"):
                make("http://127.0.0.1:9", key=PIN, token=blank)
        with pytest.raises(lacre.UsageError, match="key"):
            proxy.ProxyAccess.on(80, blank)
        with pytest.raises(lacre.UsageError, match="name"):
            proxy.ProxyAccess.on(80, "k" * 40, names=[blank])
        with pytest.raises(lacre.UsageError, match="origin"):
            proxy.ProxyAccess.on(80, "k" * 40, origins=[blank])

    @pytest.mark.parametrize("command", [["chat", "hi"], ["ask", "hi"], ["status"], ["proxy"], ["manifest", "show"]])
    def test_an_option_of_the_command(self, command: list[str]) -> None:
        result = CliRunner().invoke(app, [*command, "--url", ""])
        assert isinstance(result.exception, lacre.UsageError)
        assert "LACRE_URL is used only if" in str(result.exception)

    def test_an_option_that_is_empty_was_given_all_the_same(self) -> None:
        assert sampling("", 3, None) == {"max_tokens": 3, "model": ""}


class TestTheEnvironment:
    """A variable that is empty counts as unset."""

    @pytest.mark.parametrize("variable", ["LACRE_URL", "LACRE_TOKEN"])
    def test_needed(self, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        monkeypatch.setenv(variable, "")
        with pytest.raises(lacre.SettingsError, match=variable):
            lacre.Client()

    def test_not_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LACRE_DPOP_KEY", "")
        lacre.Client().close()
