"""`lacre chat`, `ask` and `status`, as they are typed: at a terminal, which tmux is, and in pipes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lacre import errors, problems
from lacre.cli.output import EXIT_CODES, exit_code, printable
from lacre.cli.render import ended_blocks
from lacre_backend.api.app import create_app
from parts.bent import without
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay, served
from parts.up import LACRE

TMUX = shutil.which("tmux")
SEALED = "/v1/sealed"


@pytest.fixture(scope="module")
def engine() -> Iterator[EchoEngine]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    yield engine
    engine.close()


@pytest.fixture
def gateway(engine: EchoEngine) -> Iterator[Gateway]:
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live


def run(gateway: Gateway, home: Path, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    variables = settings(gateway, home) | env
    return subprocess.run(
        [*LACRE, *arguments], check=False, capture_output=True, text=True, input=stdin, env=variables, timeout=90
    )


class TestAsk:
    def test_stdin_is_what_the_question_is_about(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, "ask", "Summarise.", stdin="The sea is wide.\n")
        assert done.stdout == "Summarise.\n\nThe sea is wide.\n"  # the engine says what it was asked
        assert done.stderr == ""

    def test_either_alone(self, gateway: Gateway, tmp_path: Path) -> None:
        assert run(gateway, tmp_path, "ask", "Sea?").stdout == "Sea?\n"
        assert run(gateway, tmp_path, "ask", stdin="Sea!\n").stdout == "Sea!\n"

    def test_nothing(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, "ask")
        assert done.returncode == 1
        assert "nothing was asked" in done.stderr

    def test_json(self, gateway: Gateway, tmp_path: Path) -> None:
        told = json.loads(run(gateway, tmp_path, "ask", "--json", "Sea?").stdout)
        assert (told["text"], told["model"], told["usage"]["completion"], told["attempts"]) == ("Sea?", "tiny", 4, 1)
        assert told["verification"]["receipt"]["completion_tokens"] == 4

    def test_a_schema_goes_along(self, gateway: Gateway, tmp_path: Path) -> None:
        schema = {
            "type": "object",
            "properties": {"sea": {"type": "string"}},
            "required": ["sea"],
            "additionalProperties": False,
        }
        file = tmp_path / "schema.json"
        file.write_text(json.dumps(schema))
        run(gateway, tmp_path, "ask", "Sea?", "--schema", str(file))
        asked = json.loads(gateway.relay.opened[-1].request.content)
        assert asked["response_format"]["json_schema"]["schema"] == schema


class TestStatus:
    def test_every_check(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, "status", COLUMNS="200")
        assert done.returncode == 0, done.stderr
        rows = {line[3:].split("  ")[0]: line[0] for line in done.stdout.splitlines()}
        assert rows == dict.fromkeys(
            ["root", "signer", "manifest", "valid until", "sealed to", "KEM", "receipt", "audit", "models", "answered"], "✓"
        )

    def test_json_without_a_question(self, gateway: Gateway, tmp_path: Path) -> None:
        told = json.loads(run(gateway, tmp_path, "status", "--json", "--no-ask").stdout)
        assert (told["ok"], told["models"], told["sealed_to"], told["receipt"]) == (True, ["tiny"], None, None)
        assert told["manifest"]["version"] == 1
        assert not [request for request in gateway.relay.requests if request.url.path == SEALED]

    def test_what_fails_is_told_with_what_holds(self, gateway: Gateway, tmp_path: Path) -> None:
        gateway.relay.respond = lambda request: served(403, problems.FORBIDDEN.body()) if request.url.path == SEALED else None
        done = run(gateway, tmp_path, "status", "--json")
        told = json.loads(done.stdout)
        assert done.returncode == 3
        assert (told["ok"], told["error"]["type"], told["models"]) == (False, "Forbidden", ["tiny"])
        assert told["error"]["remedy"] == problems.FORBIDDEN.remedy

    def test_a_root_that_did_not_sign(self, gateway: Gateway, tmp_path: Path) -> None:
        other = Relay(gateway.relay.app).url.partition("?")[2]
        done = run(gateway, tmp_path, "status", LACRE_URL=f"{gateway.url.partition('?')[0]}?{other}")
        assert done.returncode == 5
        assert "–  manifest" in done.stdout and "what helps" in done.stderr


class TestExitCodes:
    def test_every_error_has_one(self) -> None:
        kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LacreError)]
        made = {kind.__name__: exit_code(kind.__new__(kind)) for kind in kinds}
        assert (made["Forbidden"], made["NetworkError"], made["OpenError"]) == (3, 4, 5)
        assert (made["TruncatedStream"], made["ApiError"], made["SettingsError"]) == (6, 7, 1)

    def test_the_guide_lists_them(self) -> None:
        guide = (Path(__file__).resolve().parents[2] / "docs/command.md").read_text()
        listed = dict(re.findall(r"^\| (\d+) \| .*?`(\w+)`", guide, re.MULTILINE))
        assert listed == {str(code): kind.__name__ for kind, code in EXIT_CODES.items()}

    @pytest.mark.parametrize(("arguments", "code"), [(["ask", "x"], 4), (["nonsense"], 2), (["--version"], 0)])
    def test_as_they_come(self, gateway: Gateway, tmp_path: Path, arguments: list[str], code: int) -> None:
        # Nobody speaks TLS there: the client fails at once. It would wait half a minute for a gateway that is away.
        no_tls_there = gateway.url.replace("lacre+http://", "lacre://")
        assert run(gateway, tmp_path, *arguments, LACRE_URL=no_tls_there).returncode == code

    def test_the_models_server(self, gateway: Gateway, tmp_path: Path) -> None:
        assert run(gateway, tmp_path, "ask", "x", "--model", "gone").returncode == 7

    def test_a_broken_answer(self, gateway: Gateway, tmp_path: Path) -> None:
        gateway.relay.bend = without
        done = run(gateway, tmp_path, "ask", "x")
        assert done.returncode == 6


@pytest.mark.parametrize(("shell", "words"), [("bash", "lacre ch"), ("zsh", "lacre ch"), ("fish", "lacre ch")])
def test_completion(shell: str, words: str) -> None:
    variables = {
        **os.environ, "_LACRE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    command = Path(sys.executable).with_name("lacre")
    done = subprocess.run([command], check=False, capture_output=True, text=True, env=variables)
    assert "chat" in done.stdout


@pytest.mark.parametrize(
    ("text", "ended"),
    [("one", 0), ("one\n\ntwo", 5), ("one\n\n", 5), ("```\na\n\nb", 0), ("x\n\n```\na\n\nb", 3), ("```\na\n\nb\n```\n\nc", 14)],
)
def test_blocks_that_have_ended(text: str, ended: int) -> None:
    assert ended_blocks(text) == ended


def test_a_model_does_not_command_the_terminal() -> None:
    assert printable("a\x1b]52;c;aGk=\x07\x9b2Jb\tc\nd\r") == "a�]52;c;aGk=��2Jb\tc\nd�"


class Screen:
    """A terminal of its own, in tmux."""

    def __init__(self, home: Path) -> None:
        self.socket = str(home / "tmux")

    def tmux(self, *arguments: str, **options: Any) -> str:
        command = [str(TMUX), "-S", self.socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        line = " ".join(map(shlex.quote, command)) + "; echo ended with $?; sleep 100"
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", "110", "-y", "40", line, env=environment | {"TERM": "xterm-256color"}
        )

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def text(self, *options: str) -> str:
        return self.tmux("capture-pane", "-p", *options)

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, shown := self.text()):
            assert time.monotonic() < deadline, f"{pattern!r} is not on the screen:\n{shown}"
            time.sleep(0.05)
        return shown


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    if TMUX is None:
        pytest.skip("tmux is not installed")
    screen = Screen(tmp_path)
    yield screen
    subprocess.run([TMUX, "-S", screen.socket, "kill-server"], check=False, capture_output=True)


class TestChat:
    def test_a_conversation(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        screen.start([*LACRE, "chat"], settings(gateway, tmp_path) | {"LANG": "C.UTF-8"})
        shown = screen.wait_for(r"A sealed chat with tiny[^🔒]*🔒 root \S{8}… · manifest v1")
        assert re.search(r"🔒 root \S{8}… · manifest v1", shown)
        screen.wait_for(r"\n>\s*\n")

        screen.keys("# The sea", "C-j", "C-j", "It is **wide**.", "Enter")  # one message, of three lines
        shown = screen.wait_for(
            r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+ · receipt ✓ · audit\s+#\d+ ✓"
        )
        answer = shown.rpartition("It is **wide**.")[2]
        assert "The sea" in answer and "It is wide." in answer and "**" not in answer  # Markdown, rendered
        assert json.loads(gateway.relay.opened[-1].request.content)["messages"][0]["content"] == "# The sea\n\nIt is **wide**."
        assert "\x1b[1mwide" in screen.text("-e")
        screen.wait_for("sealed to default .*MLKEM768-X25519 · receipt ✓ · audit #")

        screen.keys("Second.", "Enter")
        screen.wait_for(r"Second\.[\s\S]*Second\.[\s\S]*7 tokens")
        asked = json.loads(gateway.relay.opened[-1].request.content)["messages"]
        assert [turn["role"] for turn in asked] == ["user", "assistant", "user"]

        screen.keys("Up")  # history
        screen.wait_for(r"\n> Second\.\s*\n")
        screen.keys("C-c", "/lock", "Enter")
        screen.wait_for(r"✓  KEM +MLKEM768-X25519")
        screen.keys("/clear", "Enter", f"/save {tmp_path}/talk.md", "Enter")
        screen.wait_for("written to")
        assert stat.S_IMODE((tmp_path / "talk.md").stat().st_mode) == 0o600
        screen.keys("C-d")
        screen.wait_for("ended with 0")
        assert "Second" not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())

    def test_ctrl_c_cuts_an_answer_off_and_errors_do_not_end_it(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        stop = False

        async def before(i: int) -> None:
            while i > 20 and not stop:
                await anyio.sleep(0.02)

        gateway.before = before
        screen.start([*LACRE, "chat", "--plain"], settings(gateway, tmp_path) | {"LANG": "C.UTF-8"})
        screen.wait_for(r"\n>\s*\n")
        screen.keys("A sentence that is long enough to be cut off.", "Enter")
        screen.wait_for(r"\nA sentence that")
        screen.keys("C-c")
        screen.wait_for("stopped; the question and its")
        stop = True
        gateway.relay.respond = lambda request: served(403, problems.FORBIDDEN.body()) if request.url.path == SEALED else None
        screen.wait_for(r"answer are forgotten\s+>")
        screen.keys("Second.", "Enter")
        screen.wait_for("error: Policy does not allow this")
        gateway.relay.respond = lambda _request: None
        screen.keys("Third.", "Enter")
        screen.wait_for(r"Third\.\n[\s\S]*6 tokens")
        asked = json.loads(gateway.relay.opened[-1].request.content)["messages"]
        assert [turn["content"] for turn in asked] == ["Third."]
        screen.keys("C-d")
        screen.wait_for("ended with 0")

    def test_one_question_in_a_pipe_is_plain(self, gateway: Gateway, tmp_path: Path) -> None:
        assert run(gateway, tmp_path, "chat", "**x**").stdout == "**x**\n"
        done = run(gateway, tmp_path, "chat", stdin="Hello.\n\nAgain.\n")
        assert done.stdout == "Hello.\nAgain.\n"

    def test_history_is_kept_only_where_it_is_asked_for(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        file = tmp_path / "typed"
        screen.start([*LACRE, "chat", "--history", str(file)], settings(gateway, tmp_path) | {"LANG": "C.UTF-8"})
        screen.wait_for(r"\n>\s*\n")
        screen.keys("Kept.", "Enter")
        screen.wait_for("5 tokens")
        screen.keys("C-d")
        screen.wait_for("ended with 0")
        assert "Kept." in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
