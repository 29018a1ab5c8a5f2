"""Which model file a receipt may name: what the manifest says of it, and what the caller pinned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

import lacre
import lacre.legacy
from lacre.cli import app
from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.trust.manifest import ModelEntry, Pool
from parts.chat_app import ChatApp
from parts.relay import Relay, Wire, connect, connect_async

ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)


def serving(digest: str, *named: str, **members: Any) -> Relay:
    """A relay whose receipts have this `model`, and whose manifest names these digests."""
    bend = lambda receipt: [dataclasses.replace(receipt, model=digest, **members)]  # noqa: E731
    return Relay(ChatApp(), entry=ModelEntry(named), receipts=bend)


def asked(relay: Relay, pin: str | None = None) -> str:
    """What became of a chat: the error, or the text."""
    options = {} if pin is None else {"pin_models": {"tiny": f"sha256:{pin}"}}
    with connect(relay, **options) as client:
        try:
            return client.chat("x").text
        except lacre.WrongModel as exc:
            assert isinstance(exc, lacre.VerificationError) and exc.remedy
            return str(exc)


@pytest.mark.parametrize(
    ("served", "named", "pin"),
    [
        (f"sha256:{ONE}", (), None), ("", (), None), ("anything", (), None), (f"sha256:{ONE}", (ONE,), None),
        (f"sha256:{TWO}", (ONE, TWO), None), (f"sha256:{ONE}", (), ONE), (f"sha256:{TWO}", (ONE, TWO), TWO),
    ],
)  # fmt: skip
def test_accepted(served: str, named: tuple[str, ...], pin: str | None) -> None:
    assert asked(serving(served, *named), pin) == "one two three"


@pytest.mark.parametrize(
    ("served", "named", "pin", "told"),
    [
        (f"sha256:{TWO}", (ONE,), None, f"names 'sha256:{TWO}' for the model 'tiny' instead of sha256:{ONE}"),
        (f"sha256:{THREE}", (ONE, TWO), None, f"instead of sha256:{ONE} or 1 more"),
        ("", (ONE,), None, "names no file for the model"),
        (ONE, (ONE,), None, f"names '{ONE}' for"),
        (f"sha256:{TWO}", (), ONE, f"instead of sha256:{ONE}"),
        (f"sha256:{TWO}", (ONE, TWO), ONE, f"instead of sha256:{ONE}"),
        (f"sha256:{TWO}", (TWO,), ONE, "nothing was sent"),
        (f"sha256:{ONE}", (TWO,), ONE, "nothing was sent"),
        ("\x1b[31m" * 100, (ONE,), None, "'\\x1b[31m"),
    ],
)  # fmt: skip
def test_refused(served: str, named: tuple[str, ...], pin: str | None, told: str) -> None:
    relay = serving(served, *named)
    said = asked(relay, pin)
    assert told in said and len(said) < 400
    assert len(relay.sealed) == ("nothing was sent" not in told), "it is not tried again"


def test_on_streams_and_raw_responses() -> None:
    relay = serving(f"sha256:{TWO}", ONE)
    with connect(relay) as client:
        with pytest.raises(lacre.WrongModel):
            list(client.chat_stream("x"))
        with pytest.raises(lacre.WrongModel):
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})


async def test_awaited() -> None:
    async with connect_async(serving(f"sha256:{TWO}", ONE)) as client:
        with pytest.raises(lacre.WrongModel) as caught:
            await client.chat("x")
    assert caught.value.verification.sealed_to is not None


def test_what_ran_no_model_names_no_file() -> None:
    relay = serving("", ONE, prompt_tokens=0, cached_tokens=0, completion_tokens=0)
    with connect(relay) as client:
        assert client.get("/v1/models").extensions["lacre"].receipt.model == ""
        assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
        relay.receipts = lambda receipt: [dataclasses.replace(receipt, model=f"sha256:{TWO}")]
        with pytest.raises(lacre.WrongModel):
            client.get("/v1/models")


def test_another_model_is_not_pinned() -> None:
    with connect(serving(f"sha256:{TWO}"), pin_models={"large": f"sha256:{ONE}"}) as client:
        assert client.chat("x").text


def test_in_httpx_and_openai() -> None:
    pins = {"tiny": f"sha256:{ONE}"}
    for make in (lacre.legacy.Client, lacre.OpenAI):
        relay = serving(f"sha256:{TWO}")
        client: Any = make(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay), pin_models=pins)
        with client, pytest.raises(Exception) as caught:
            ask(client)
        assert "sha256:" in str(chain(caught.value))


def ask(client: Any) -> Any:
    if hasattr(client, "chat"):
        return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})


def chain(exc: BaseException) -> lacre.WrongModel:
    """The error of Lacre beneath another package's."""
    below: BaseException | None = exc
    while below is not None and not isinstance(below, lacre.WrongModel):
        below = below.__cause__
    assert isinstance(below, lacre.WrongModel)
    return below


@pytest.mark.parametrize(
    "pins",
    [
        "sha256:" + ONE, [("tiny", ONE)], {"tiny": ONE}, {"tiny": "sha256:" + "A" * 64}, {"tiny": f"sha256:{ONE}0"},
        {"tiny": None}, {"tiny": f"sha256:{ONE}\n"}, {1: f"sha256:{ONE}"},
    ],
)  # fmt: skip
def test_a_pin_that_is_none(pins: Any) -> None:
    with pytest.raises(lacre.UsageError, match=r"^pin_models"):
        connect(Relay(ChatApp()), pin_models=pins)


@pytest.mark.parametrize("between", [",", " ", ", \n"])
def test_pins_from_the_environment(monkeypatch: pytest.MonkeyPatch, between: str) -> None:
    relay = serving(f"sha256:{TWO}")
    monkeypatch.setenv("LACRE_PIN_MODELS", between.join((f"tiny=sha256:{ONE}", f"a=b=sha256:{THREE}")))
    assert f"instead of sha256:{ONE}" in asked(relay)
    assert asked(relay, TWO) == "one two three"  # the argument outranks it
    monkeypatch.setenv("LACRE_PIN_MODELS", "")
    assert asked(relay) == "one two three"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tiny", "has 'tiny'"), (f"=sha256:{ONE}", "has '=sha256:"), (f"tiny={ONE}", "64 hexadecimal digits"),
        ("tiny=sha256:" + "A" * 64, "in small letters"), (f"tiny=sha256:{ONE} tiny=sha256:{TWO}", "pins two files"),
    ],
)  # fmt: skip
def test_pins_of_the_environment_that_are_none(monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.setenv("LACRE_PIN_MODELS", given)
    with pytest.raises(lacre.SettingsError, match=rf"^LACRE_PIN_MODELS .*{said}"):
        connect(Relay(ChatApp()))


@pytest.mark.parametrize("command", [["ask", "hi"], ["chat", "hi"], ["status"], ["proxy", "--port", "0"]])
def test_a_pin_of_the_command_that_is_none(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--pin-model", "tiny=1"])
    assert isinstance(done.exception, lacre.SettingsError)
    assert str(done.exception).startswith("--pin-model has 'tiny=1'")


def changed(change: Callable[[dict[str, Any]], object]) -> Pool:
    pool = Pool({"b": ModelEntry((ONE,), (TWO,)), "a": ModelEntry()}, (), bytes(32), ("pad",))
    members = json.loads(json.dumps(pool.members(), sort_keys=True))
    change(members)
    return Pool.parse(Members(members, "a pool"))


def test_a_pool_is_read_whatever_the_order_of_its_members() -> None:
    pool = changed(lambda _pool: None)
    assert (list(pool.models), pool.models["b"]) == (["b", "a"], ModelEntry((ONE,), (TWO,)))
    assert changed(lambda pool: pool["models"]["b"].update(colour="red")) == pool


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: pool.update(default_model="c"), lambda pool: pool.update(default_model=None),
        lambda pool: pool["models"]["a"].update(sha256=["sha256:" + ONE]), lambda pool: pool["models"]["a"].pop("sha256"),
        lambda pool: pool["models"]["a"].update(signers=["A" * 64]), lambda pool: pool.update(models=["b"]),
        lambda pool: pool["models"]["a"].update(sha256=[ONE + "\n"]),
    ],
)  # fmt: skip
def test_a_pool_that_says_other_things(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(InvalidMessage):
        changed(change)
