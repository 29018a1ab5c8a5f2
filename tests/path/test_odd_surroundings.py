"""Every command with odd arguments, in odd surroundings: documented exit codes, no traceback, and no answer lost in silence.

The commands and their parameters are found by walking the command itself: a new one is covered unasked. Each runs as a
process of its own, so `slow` has the wide search, and the ordinary suite a small part of it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lacre import cli
from lacre.cli.output import EXIT_CODES
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside
from parts.live import settings as of_client
from parts.relay import Relay
from parts.up import LACRE

MEMORY: Final = 6_000_000  # KiB
CODES: Final = {0, 1, 2, *EXIT_CODES.values()}
ANSWER: Final = "The sea is wide."
# What serves until it is ended, makes a whole Lacre, or measures for long: with odd options, they end by themselves.
SERVERS: Final = {("up",), ("demo",), ("proxy",), ("model", "default")}
TEXTS: Final = (
    "", " ", "x", "-1", "0", "1e999", "nan", "٣", "caf\udce9", "é日本🔒", "a\nb", "\x1b[31m", "/", "/dev/null", "/dev/zero",
    "nowhere/x", "lacre://a..b?trust=" + "A" * 43, "http://[", "{", "[" * 3000, "y" * 5000, "2026-01-01", "9" * 20,
)  # fmt: skip
VARIABLES: Final[dict[str, tuple[str, ...]]] = {
    "COLUMNS": ("0", "-1", "x", "1", "99999"),
    "LINES": ("0", "x"),
    "TERMINAL_WIDTH": ("0", "x"),
    "TERM": ("", "dumb", "unknown"),
    "FORCE_COLOR": ("1",),
    "NO_COLOR": ("1",),
    "LC_ALL": ("C", "POSIX", "garbage"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16"),
    "HTTP_PROXY": ("socks5://x", "http://[", "x y", "http://a..b"),
    "ALL_PROXY": ("socks://x", "://"),
    "NO_PROXY": ("[::", "*", "a b,,"),
    "SSL_CERT_FILE": ("/nonexistent", "/", "/etc/hostname"),
    "SSL_CERT_DIR": ("/nonexistent", "/etc/hostname"),
    "HOME": ("", "nowhere", "/dev/null"),
    "XDG_STATE_HOME": ("", "x", "/dev/null", "/proc", "/sys"),
    "TMPDIR": ("/nonexistent",),
    "LACRE_URL": ("", "x", "lacre://a..b?trust=x"),
    "LACRE_TOKEN": ("", "a b", "caf\udce9"),
    "LACRE_DPOP_KEY": ("/", "/dev/null", "x"),
    "LACRE_PIN_MODELS": ("", ",", "x", "x=sha256:1", "\udce9=sha256:" + "1" * 64),
}
REDIRECTED: Final = ("", "", "", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "</dev/zero", "| true")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that can be run, and what it is called by."""
    below = getattr(command, "commands", {})
    if not below or getattr(command, "invoke_without_command", False):
        yield path, command
    for name, each in sorted(below.items()):
        yield from commands(each, (*path, name))


def _registered() -> dict[tuple[str, ...], Any]:
    cli.register()
    return dict(commands(typer.main.get_command(cli.app)))


COMMANDS: Final = _registered()


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live
    engine.close()


@st.composite
def arguments(draw: st.DrawFn, command: Any) -> list[str]:
    """A few of the command's parameters, with odd values; those that it requires mostly among them."""
    words: list[str] = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion") or not draw(
            st.integers(0, 9).map(lambda n, wanted=parameter.required: n < (9 if wanted else 3))
        ):
            continue
        value = draw(st.sampled_from(TEXTS))
        if parameter.param_type_name == "argument":
            words += [] if value.startswith("-") else [value]
        elif getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0])
        else:
            words += [parameter.opts[0], value]
    return words


surroundings = st.lists(
    st.sampled_from([(name, value) for name, values in VARIABLES.items() for value in values]), max_size=2
).map(dict)


def run(
    gateway: Gateway, home: Path, words: tuple[str, ...], variables: dict[str, str], redirected: str = ""
) -> subprocess.CompletedProcess[bytes]:
    piped = redirected.startswith("|")
    script = f'"$@" {redirected}; exit ${{PIPESTATUS[0]}}' if piped else f'"$@" {redirected}'
    script = f"ulimit -v {MEMORY}; {script}"  # what is read without end, such as /dev/zero, ends there with a traceback
    environment = of_client(gateway, home) | {"TMPDIR": str(home)} | variables
    command = ["bash", "-c", script, "bash", *LACRE, *(os.fsencode(word) for word in words)]
    done = subprocess.run(
        command, check=False, capture_output=True, env=environment, cwd=home, timeout=100, stdin=subprocess.DEVNULL
    )
    said = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in said and "Exception ignored" not in said, (words, variables, redirected, said)
    assert done.returncode in CODES, (words, variables, redirected, done)
    return done


def search(gateway: Gateway, home: Path, examples: int, seed_of: st.SearchStrategy[tuple[str, ...]]) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run_one(data: st.DataObject) -> None:
        path = data.draw(seed_of)
        words = (*path, *data.draw(arguments(COMMANDS[path])))
        if path in SERVERS:
            words = (*path, "--nonsense")
        run(gateway, home, words, data.draw(surroundings), data.draw(st.sampled_from(REDIRECTED)))

    run_one()


def test_every_command_is_walked() -> None:
    assert {("ask",), ("keys", "list"), ("audit", "verify"), ("budget", "show"), ("worker", "check"), ("doctor",)} <= set(
        COMMANDS
    )


@pytest.mark.slow
def test_some_commands_in_odd_surroundings(gateway: Gateway, tmp_path: Path) -> None:
    search(gateway, tmp_path, 8, st.sampled_from(sorted(COMMANDS)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", sorted(COMMANDS), ids=" ".join)
def test_each_command_in_odd_surroundings(gateway: Gateway, tmp_path: Path, path: tuple[str, ...]) -> None:
    search(gateway, tmp_path, 3, st.just(path))


def answered(gateway: Gateway, home: Path, variables: dict[str, str], redirected: str) -> None:
    """What `ask` and `chat` were told is either all on stdout, or the exit code is not 0."""
    for words in (("ask", ANSWER), ("chat", ANSWER), ("ask", "--json", ANSWER)):
        done = run(gateway, home, words, variables, redirected)
        heard = not any(sign in redirected for sign in (">&-", ">/dev/full", "|")) or redirected.startswith("2")
        if done.returncode == 0:
            assert heard and ANSWER in done.stdout.decode(variables.get("PYTHONIOENCODING", "utf-8"), "replace"), (words, done)


@pytest.mark.parametrize("number", range(3))
def test_no_answer_is_lost(gateway: Gateway, tmp_path: Path, number: int) -> None:
    each = [("COLUMNS", "0", ""), ("PYTHONIOENCODING", "ascii", "2>&-"), ("LC_ALL", "C", ">/dev/full")]
    name, value, redirected = each[number]
    answered(gateway, tmp_path, {name: value}, redirected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_answer_is_lost_anywhere(gateway: Gateway, tmp_path: Path) -> None:
    @settings(max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(surroundings, st.sampled_from(REDIRECTED))
    def run_one(variables: dict[str, str], redirected: str) -> None:
        answered(gateway, tmp_path, variables, redirected)

    run_one()
