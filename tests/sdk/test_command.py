"""`lacre chat`, `ask` and `status`, as they are typed: at a terminal, which tmux is, and in pipes."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from lacre import errors, problems
from lacre.chat.blocks import ended_blocks
from lacre.cli.explain import bar
from lacre.cli.output import EXIT_CODES, exit_code, printable
from lacre_backend.api.app import create_app
from parts.bent import without
from parts.commands import run_lacre
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay, refusing, served
from parts.screen import TMUX, Screen
from parts.terminal import at_terminal
from parts.up import LACRE


@pytest.fixture(scope="module")
def engine() -> Iterator[EchoEngine]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    yield engine
    engine.close()


@pytest.fixture
def gateway(engine: EchoEngine) -> Iterator[Gateway]:
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path) -> Run:
    """Runs the command to its end, against the gateway."""

    def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return run_lacre(*arguments, stdin=stdin, env=settings(gateway, tmp_path) | env)

    return run


class TestAsk:
    """The engine says what it was asked."""

    @pytest.mark.parametrize(
        ("arguments", "stdin", "answer"),
        [
            (["ask", "Summarise."], "The sea is wide.\n", "Summarise.\n\nThe sea is wide.\n"),
            (["ask", "Sea?"], "", "Sea?\n"),
            (["ask"], "Sea!\n", "Sea!\n"),
            (["chat", "**x**"], "", "**x**\n"),
            (["chat"], "Hello.\n\nAgain.\n", "Hello.\nAgain.\n"),
        ],
        ids=["about stdin", "alone", "stdin alone", "a chat of one question", "a chat in a pipe"],
    )
    def test_in_a_pipe(self, run: Run, arguments: list[str], stdin: str, answer: str) -> None:
        done = run(*arguments, stdin=stdin)
        assert (done.stdout, done.stderr) == (answer, "")

    def test_json_and_a_schema_that_goes_along(self, gateway: Gateway, run: Run, tmp_path: Path) -> None:
        sea = {"type": "object", "properties": {"sea": {"type": "string"}}, "required": ["sea"], "additionalProperties": False}
        (tmp_path / "schema.json").write_text(json.dumps(sea))
        told = json.loads(run("ask", "--json", "Sea?").stdout)
        assert (told["text"], told["model"], told["usage"]["completion"], told["attempts"]) == ("Sea?", "tiny", 4, 1)
        assert told["verification"]["receipt"]["completion_tokens"] == 4
        run("ask", "Sea?", "--schema", str(tmp_path / "schema.json"))
        asked = json.loads(gateway.relay.opened[-1].request.content)
        assert asked["response_format"]["json_schema"]["schema"] == sea


class TestExplain:
    """The echo says its prompt, so an answer rests on the part that it begins with."""

    def test_files_are_parts(self, run: Run, tmp_path: Path) -> None:
        for name, text in (("oslo", "Oslo"), ("rome", "Rome")):
            (tmp_path / name).write_text(text)
        files = [str(tmp_path / "oslo"), str(tmp_path / "rome")]
        done = run("explain", "Where?", *files, "--answer", "Oslo")
        answer, empty, heading, *rows = done.stdout.splitlines()
        assert (answer, empty, heading.split(), done.stderr) == ("Oslo", "", ["part", "nats", "share"], "")
        assert [row.split() for row in rows] == [[files[0], "80.0", "100%", "█" * 24], [files[1], "0.0", "0%"]]

    def test_paragraphs_are_parts_and_the_model_answers(self, run: Run) -> None:
        told = json.loads(run("explain", "Where?", "--json", "--max-tokens", "4", stdin="Oslo\n \n\nRome\n\n").stdout)
        assert (told["answer"], [part["id"] for part in told["parts"]]) == ("Oslo", ["1", "2"])
        assert told["verification"]["receipt"]["completion_tokens"] == 4

    def test_a_lens(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "oslo").write_text("Oslo")
        arguments = ["explain", "Where?", str(tmp_path / "oslo"), "--answer", "O!", "--lens"]
        *_, heading, first, last, legend = run(*arguments).stdout.splitlines()
        assert heading.split() == ["token", "layers", "0", "to", "2", "from", "before"]
        assert (first.split(), last.split()) == (["'O'", "▓▓█", "2", "'?'"], ["'!'", "▓▓▓", "-", "'s'"])
        assert legend == "█ rank 1  ▓ to 10  ▒ to 100  ░ to 1000  · beyond"
        assert json.loads(run(*arguments, "--json").stdout)["lens"]["layers"] == [0, 1, 2]

    def test_without_parts(self, run: Run) -> None:
        done = run("explain", "Where?", stdin=" \n")
        assert (done.returncode, "there are no parts" in done.stderr) == (1, True)

    def test_a_picture_at_a_terminal(self, gateway: Gateway, tmp_path: Path) -> None:
        (tmp_path / "oslo").write_text("Oslo")
        arguments = ["explain", "Where?", str(tmp_path / "oslo"), "--answer", "Osl0\x1b[2J"]
        shown = at_terminal([*LACRE, *arguments], settings(gateway, tmp_path) | {"TERM": "xterm-256color", "COLUMNS": "200"})
        assert "Osl\x1b[1;31m0" in shown, "a surprise has a colour"
        assert "\x1b[2J" not in shown and "█" in shown and "from 6 bits" in shown


@pytest.mark.parametrize(("share", "drawn"), [(0, ""), (1 / 192, "▏"), (0.5, "█" * 12), (1, "█" * 24), (7, "█" * 24)])
def test_a_bar(share: float, drawn: str) -> None:
    assert bar(share) == drawn


class TestStatus:
    def test_every_check(self, run: Run) -> None:
        done = run("status", COLUMNS="200")
        assert done.returncode == 0, done.stderr
        rows = {line[3:].split("  ")[0]: line[0] for line in done.stdout.splitlines()}
        assert rows == dict.fromkeys(
            ["root", "signer", "manifest", "valid until", "sealed to", "KEM", "receipt", "audit", "models", "answered"], "✓"
        )

    def test_json_without_a_question(self, gateway: Gateway, run: Run) -> None:
        told = json.loads(run("status", "--json", "--no-ask").stdout)
        assert (told["ok"], told["models"], told["sealed_to"], told["receipt"]) == (True, ["tiny"], None, None)
        assert told["manifest"]["version"] == 1
        assert not gateway.relay.sealed

    def test_what_fails_is_told_with_what_holds(self, gateway: Gateway, run: Run) -> None:
        gateway.relay.respond = refusing(problems.FORBIDDEN)
        done = run("status", "--json")
        told = json.loads(done.stdout)
        assert done.returncode == 3
        assert (told["ok"], told["error"]["type"], told["models"]) == (False, "Forbidden", ["tiny"])
        assert told["error"]["remedy"] == problems.FORBIDDEN.remedy

    @pytest.mark.parametrize("arguments", [["ask", "Sea?"], ["explain", "Where?", "--answer", "Oslo"], ["manifest", "show"]])
    def test_with_json_an_error_is_json_too_and_names_the_request(
        self, gateway: Gateway, run: Run, arguments: list[str]
    ) -> None:
        gateway.relay.respond = lambda _request: served(
            403, problems.FORBIDDEN.body(), {"content-type": problems.MEDIA_TYPE, "lacre-request-id": "r7"}
        )
        done = run(*arguments, "--json", stdin="Oslo\n\nRome")
        told = json.loads(done.stdout)["error"]
        assert (done.returncode, told["type"], told["request_id"]) == (3, "Forbidden", "r7")
        assert told["message"] in done.stderr and told["message"].endswith("(request id: r7)")

    def test_a_root_that_did_not_sign(self, gateway: Gateway, run: Run) -> None:
        other = Relay(gateway.relay.app).url.partition("?")[2]
        done = run("status", LACRE_URL=f"{gateway.url.partition('?')[0]}?{other}")
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

    @pytest.mark.parametrize(
        ("arguments", "code", "told"),
        [
            ("ask x", 4, ""), ("nonsense", 2, ""), ("--version", 0, ""),
            ("ask x --model gone", 7, ""), ("ask broken", 6, ""), ("ask", 1, "nothing was asked"),
        ],
    )  # fmt: skip
    def test_as_they_come(self, gateway: Gateway, run: Run, arguments: str, code: int, told: str) -> None:
        if code == 6:
            gateway.relay.bend = without
        # Nobody speaks TLS there: the client fails at once. It would wait half a minute for a gateway that is away.
        url = gateway.url.replace("lacre+http://", "lacre://") if code == 4 else gateway.url
        done = run(*arguments.split(), LACRE_URL=url)
        assert (done.returncode, told in done.stderr) == (code, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    variables = {
        **os.environ, "_LACRE_COMPLETE": f"complete_{shell}", "COMP_WORDS": "lacre ch", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "lacre ch", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
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


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    if TMUX is None:
        pytest.skip("tmux is not installed")
    screen = Screen(tmp_path)
    yield screen
    screen.tmux("kill-server", check=False)


class TestChat:
    def test_a_conversation(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        screen.start_chat(settings(gateway, tmp_path))
        screen.wait_for(r"A sealed chat with tiny[^🔒]*🔒 root \S{8}… · manifest v1")

        screen.keys("# The sea", "C-j", "C-j", "It is **wide**.", "Enter")  # one message, of three lines
        shown = screen.wait_for(
            r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+ · receipt ✓ · audit\s+#\d+ ✓"
        )
        answer = shown.rpartition("It is **wide**.")[2]
        assert "The sea" in answer and "It is wide." in answer and "**" not in answer  # Markdown, rendered
        assert turns(gateway) == [("user", "# The sea\n\nIt is **wide**.")]
        assert "\x1b[1mwide" in screen.tmux("capture-pane", "-p", "-e")
        screen.wait_for("sealed to default .*MLKEM768-X25519 · receipt ✓ · audit #")

        screen.keys("Second.", "Enter")
        screen.wait_for(r"Second\.[\s\S]*Second\.[\s\S]*7 tokens")
        assert [role for role, _ in turns(gateway)] == ["user", "assistant", "user"]

        screen.keys("Up")  # history
        screen.wait_for(r"\n> Second\.\s*\n")
        screen.keys("C-c", "/lock", "Enter")
        screen.wait_for(r"✓  KEM +MLKEM768-X25519")
        screen.keys("/clear", "Enter", f"/save {tmp_path}/talk.md", "Enter")
        screen.wait_for("written to")
        assert stat.S_IMODE((tmp_path / "talk.md").stat().st_mode) == 0o600
        screen.end()
        assert "Second" not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())

    def test_ctrl_c_cuts_an_answer_off_and_errors_do_not_end_it(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        stop = False

        async def before(i: int) -> None:
            while i > 20 and not stop:
                await anyio.sleep(0.02)

        gateway.before = before
        screen.start_chat(settings(gateway, tmp_path), "--plain")
        screen.keys("A sentence that is long enough to be cut off.", "Enter")
        screen.wait_for(r"\nA sentence that")
        screen.keys("C-c")
        screen.wait_for("stopped; the question and its")
        stop = True
        gateway.relay.respond = refusing(problems.FORBIDDEN)
        screen.wait_for(r"answer are forgotten\s+>")
        screen.keys("Second.", "Enter")
        screen.wait_for("error: Policy does not allow this")
        gateway.relay.respond = lambda _request: None
        screen.keys("Third.", "Enter")
        screen.wait_for(r"Third\.\n[\s\S]*6 tokens")
        assert turns(gateway) == [("user", "Third.")]
        screen.end()

    def test_history_is_kept_only_where_it_is_asked_for(self, gateway: Gateway, screen: Screen, tmp_path: Path) -> None:
        file = tmp_path / "typed"
        screen.start_chat(settings(gateway, tmp_path), "--history", str(file))
        screen.keys("Kept.", "Enter")
        screen.wait_for("5 tokens")
        screen.end()
        assert "Kept." in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600


def turns(gateway: Gateway) -> list[tuple[str, str]]:
    """Of the last request."""
    asked = json.loads(gateway.relay.opened[-1].request.content)["messages"]
    return [(turn["role"], turn["content"]) for turn in asked]
