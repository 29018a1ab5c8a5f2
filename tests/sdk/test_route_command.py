"""`lacre manifest route`, `manifest show` and `status`: where a request goes, before and after it went."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lacre.trust.routes import ModelRoute, RouteTarget
from lacre_backend.api.app import create_app
from parts.commands import run_lacre
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay

SHARED = (RouteTarget("default", "tiny", 3), RouteTarget("canary", "new", 1))
ROUTES = {
    "assistant": ModelRoute((RouteTarget("canary", "new", 1), RouteTarget("default", "tiny", 0))),
    "shared": ModelRoute(SHARED),
    "drawn": ModelRoute((*SHARED, RouteTarget("canary", "spare", 0)), sticky=False),
}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engines = {name: EchoEngine(name=name, n_ctx=2048) for name in ("tiny", "new")}
    default, canary = (create_app([engine]) for engine in engines.values())
    with ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.close)
        relay = Relay(default, beside={"canary": Relay(canary, model="new")}, routes=ROUTES)
        yield stack.enter_context(beside(Gateway(relay)))


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_lacre(*arguments, env=settings(gateway, tmp_path))

    return run


def test_show_names_them(run: Run) -> None:
    shown = run("manifest", "show").stdout
    assert "canary/new 1, default/tiny 0; sticky" in shown and "default/tiny 0.75, canary/new 0.25" in shown
    assert json.loads(run("manifest", "show", "--json").stdout)["routes"]["drawn"]["sticky"] is False


def test_the_way_of_a_request_is_the_one_that_it_takes(run: Run) -> None:
    told = json.loads(run("manifest", "route", "shared", "--json").stdout)
    assert {(way["pool"], way["portion"]) for way in told["pools"]} == {("default", 0.75), ("canary", 0.25)}
    served = json.loads(run("ask", "Hi.", "--model", "shared", "--json").stdout)
    assert served["verification"]["sealed_to"]["pool"] == told["pools"][0]["pool"]
    one, again = (run("manifest", "route", "shared", "--scope", "someone").stdout for _ in range(2))
    assert one == again and "75.0000%" in one


def test_in_words(run: Run) -> None:
    lines = [line.split() for line in run("manifest", "route", "assistant").stdout.splitlines()]
    assert lines[1:] == [
        ["first", "canary", "new", "100.0000%"],
        ["if", "those", "above", "have", "no", "worker", "default", "tiny", "0.0000%"],
    ]
    drawn = run("manifest", "route", "drawn").stdout
    assert drawn.count("drawn for each call") == 2 and drawn.count("stands by") == 1
    assert "default" in run("manifest", "route", "tiny").stdout, "a model without a route"


def test_an_unknown_name(run: Run) -> None:
    done = run("manifest", "route", "none")
    assert done.returncode == 1 and "there are tiny, assistant, shared, drawn" in done.stderr.replace("\n", " ")


def test_status_of_a_model(run: Run) -> None:
    checked = json.loads(run("status", "--model", "assistant", "--json").stdout)
    assert checked["ok"] and checked["sealed_to"]["pool"] == "canary"
    assert checked["models"] == ["tiny", "assistant", "shared", "drawn"]
