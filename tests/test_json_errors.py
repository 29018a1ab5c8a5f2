"""With `--json`, every command that fails says why as JSON on stdout, whatever failed; and no help text loses a word."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from lacre import cli
from lacre.cli.ending import wants_json
from parts.chat_app import ChatApp
from parts.commands import run_lacre
from parts.relay import Relay

# Each command, so called that it fails where there is nothing: no setting, no state folder, no file `gone`.
NOTHING: dict[str, tuple[str, ...]] = {
    "ask": ("x",),
    "explain": ("x", "gone"),
    "status": (),
    "usage": (),
    "proxy": ("--port", "0"),
    "top": (),
    "doctor": (),
    "receipt check": ("gone",),
    "manifest show": (),
    "manifest route": ("m",),
    "token check": ("-",),
    "keys list": (),
    "fabric check": (),
    "pool list": (),
    "audit verify": ("gone",),
    "audit check-proof": ("gone", "--key", "A" * 43),
    "policy check": ("gone",),
    "policy test": ("gone",),
    "policy explain": ("gone",),
    "policy replay": ("gone", "--against", "gone"),
    "budget show": (),
    "budget report": ("--audit", "gone"),
    "budget tenants": (),
    "budget top-up": ("5", "--limit", "tokens_per_day", "--plan", "free"),
    "budget reset": ("--limit", "tokens_per_day", "--plan", "free"),
    "admin drain-worker": ("n",),
    "admin resume-worker": ("n",),
    "worker check": ("--settings", "gone"),
    "worker digests": ("--settings", "gone"),
    "model inspect": ("gone",),
    "model sign": ("gone", "--key", "gone"),
    "model verify": ("gone", "--key", "gone"),
    "model seal": ("gone", "--out", "sealed", "--kms", "gone"),
    "model rewrap": ("gone", "--kms", "gone", "--to", "gone"),
    "model compare": ("gone", "gone"),
    "model quantize": ("gone", "--out", "new"),
    "model prune": ("gone", "--out", "new"),
    "model convert": ("gone", "--out", "new"),
    "model bench": ("gone",),
    "model choose": ("gone",),
}
NEED_NOTHING = {"demo", "model default"}
ADMINISTRATORS = ("top", "budget tenants", "budget top-up", "budget reset", "admin drain-worker", "admin resume-worker")
BARE = {"PATH": "/nowhere", "LANG": "C.UTF-8"}


@cache
def _all() -> tuple[tuple[str, Any], ...]:
    """Every command with its path, of all installed packages."""
    cli.register()

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, each in getattr(command, "commands", {}).items():
            yield from below(each, f"{path} {name}".strip())

    return tuple(below(typer.main.get_command(cli.app), ""))


def _error_of(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode not in (0, 2), done.stderr
    return json.loads(done.stdout).get("error")


def test_each_command_with_json_is_among_these() -> None:
    found = {path for path, command in _all() if any("--json" in each.opts for each in command.params)}
    assert found == set(NOTHING) | NEED_NOTHING


@pytest.mark.parametrize("command", NOTHING)
def test_where_there_is_nothing(command: str, tmp_path: Path) -> None:
    done = run_lacre(*command.split(), *NOTHING[command], "--json", env=BARE | {"HOME": str(tmp_path)}, cwd=tmp_path)
    assert (error := _error_of(done)) is None or error["message"] in done.stderr
    assert error is not None or command in ("audit verify", "worker check"), "their report itself says what is wrong"


@pytest.mark.parametrize("words", [("ask", "x", "--schema", ""), ("top", "--ca", "")], ids=" ".join)
def test_an_argument_that_is_refused_before_the_command_begins(words: tuple[str, ...], tmp_path: Path) -> None:
    assert "empty path" in _error_of(run_lacre(*words, "--json", env=BARE, cwd=tmp_path))["message"]


@pytest.mark.parametrize("command", ["manifest show", *ADMINISTRATORS])
def test_a_server_that_is_away(command: str, tmp_path: Path) -> None:
    """Nothing listens on port 9."""
    given = ("--admin", "http://127.0.0.1:9") if command in ADMINISTRATORS else ()
    env = BARE | {"HOME": str(tmp_path), "LACRE_URL": Relay(ChatApp()).url, "LACRE_TOKEN": "t0ken"}
    done = run_lacre(*command.split(), *NOTHING[command], *given, "--json", env=env, cwd=tmp_path)
    assert (done.returncode, _error_of(done)["type"]) == (4, "Unreachable")


def test_what_asks_for_json() -> None:
    assert wants_json(["ask", "x", "--json"])
    assert not wants_json(["ask", "--", "--json"])
    assert not wants_json(["ask", "json"])


def test_no_word_of_a_help_is_taken_for_a_style() -> None:
    """rich reads `[console]` as one, and shows nothing of it."""
    texts = [text for _, command in _all() for text in (command.help, *(getattr(each, "help", "") for each in command.params))]
    assert len(texts) > 300
    assert not [text for text in texts if re.search(r"(?<!\\)\[[a-z/@#]", text or "")]
