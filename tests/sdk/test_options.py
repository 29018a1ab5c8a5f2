"""`with_options` and `cache_scope`: other options for some calls, over the same connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lacre
from lacre import problems
from parts.chat_app import ChatApp
from parts.relay import Relay, connect, connect_async, refusing


def salts(relay: Relay) -> list[str]:
    return [opened.headers("lacre-cache-salt")[0] for opened in relay.opened]


def test_another_model_for_requests_that_name_none(client: lacre.Client, app: ChatApp) -> None:
    other = client.with_options(model="large")
    for ask in (other.chat, lambda prompt: other.chat_stream(prompt).reply(), client.chat):
        ask("Hello.")
    other.chat("Hello.", model="named")
    assert [body.partition(b'"model":"')[2].partition(b'"')[0] for body in app.bodies] == [
        b"large", b"large", b"tiny", b"named",
    ]  # fmt: skip


def test_another_pool(relay: Relay, client: lacre.Client) -> None:
    other = client.with_options(pool="second")
    with pytest.raises(lacre.UsageError, match="no pool 'second': it has default"):
        other.chat("Hello.")
    with pytest.raises(lacre.SettingsError, match="no pool 'second'"):
        other.models()
    assert not relay.sealed
    back = other.with_options(pool="default")
    assert back.models() == ("tiny",) and back.chat("Hello.").text
    assert back.verification.sealed_to is not None and back.verification.sealed_to.pool == "default"


@pytest.mark.parametrize(("retries", "sent"), [(..., 1), (2, 3)], ids=["as the client", "two"])
def test_other_retries(relay: Relay, retries: Any, sent: int) -> None:
    relay.respond = refusing(problems.NO_WORKER, retry_after="0")
    with connect(relay, retries=0) as client, pytest.raises(lacre.Unavailable):
        client.with_options(retries=retries).chat("Hello.")
    assert len(relay.sealed) == sent


def test_other_timeouts(client: lacre.Client) -> None:
    other = client.with_options(timeout=3)
    assert (other.timeout.read, other.with_options().timeout.read) == (3, 3)
    assert other.with_options(timeout=None).timeout.read is None
    assert client.timeout.read == 120


def test_everything_else_is_shared(relay: Relay) -> None:
    seen: list[str] = []
    hooks = {"response": [lambda response: seen.append(response.request.url.path)]}
    with connect(relay, event_hooks=hooks) as client:
        other = client.with_options(model="tiny")
        other.close()  # closes nothing of the first
        client.chat("Hello.")
        again = client.with_options()
        again.chat("Hello.")
        assert relay.manifests == 1 and len(seen) == 2 and len(set(salts(relay))) == 1
    with pytest.raises(lacre.UsageError, match="closed"):
        again.chat("Hello.")


async def test_async(relay: Relay, async_client: lacre.AsyncClient, app: ChatApp) -> None:
    other = async_client.with_options(model="large", timeout=5)
    assert (await other.chat("Hello.")).text == "one two three"
    assert b'"model":"large"' in app.bodies[0] and relay.manifests == 1
    await other.aclose()
    assert (await async_client.chat("Hello.")).text


@pytest.mark.parametrize(
    "options",
    [{"model": ""}, {"pool": 3}, {"retries": -1}, {"timeout": 0}, {"cache_scope": " "}, {"cache_scope": "\ud83d"}],
    ids=repr,
)
def test_mistakes(client: lacre.Client, options: dict[str, Any]) -> None:
    with pytest.raises(lacre.UsageError):
        client.with_options(**options)


class TestCacheScope:
    def test_each_user_has_a_salt_that_names_nobody(self, relay: Relay, client: lacre.Client) -> None:
        for user in ("ada", "bob", "ada", None):
            (client if user is None else client.with_options(cache_scope=user)).chat("Hello.")
        ada, bob, again, none = salts(relay)
        assert ada == again and len({ada, bob, none}) == 3
        assert all(len(salt) == 32 and bytes.fromhex(salt) for salt in salts(relay))

    def test_no_salt_outlives_its_client(self, relay: Relay) -> None:
        for _ in range(2):
            with connect(relay, cache_scope="ada") as client:
                client.chat("Hello.")
                client.with_options(cache_scope="bob").chat("Hello.")
        assert len(set(salts(relay))) == 4

    @pytest.mark.parametrize("make", [connect, connect_async])
    @pytest.mark.parametrize("scope", ["", 5, b"ada"], ids=repr)
    def test_mistakes(self, relay: Relay, make: Callable[..., Any], scope: Any) -> None:
        with pytest.raises(lacre.UsageError, match="cache_scope"):
            make(relay, cache_scope=scope)
