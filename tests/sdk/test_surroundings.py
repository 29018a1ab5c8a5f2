"""The `lacre` command in odd surroundings: streams closed, full or not UTF-8, a terminal of no size, a user of no home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay
from parts.terminal import at_terminal
from parts.up import LACRE

ANSWER = "The sea is wide.\n"
ASK = ["ask", ANSWER.strip()]  # the engine says what it was asked
WHOLE = (0, ANSWER)
Run = Callable[..., "Done"]


class Done:
    """How it ended: its code and what it printed; `said` is what it told on stderr, in one line."""

    def __init__(self, done: subprocess.CompletedProcess[bytes], encoding: str) -> None:
        self.code, self.out = done.returncode, done.stdout.decode(encoding)
        self.answer = (self.code, self.out)
        self.said = " ".join(done.stderr.decode(errors="replace").split())
        assert "Traceback" not in self.said and "Exception ignored" not in self.said, self.said

    def refuses(self, *parts: str) -> bool:
        return self.code == 1 and all(part in self.said for part in parts)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live
    engine.close()


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path) -> Run:
    def run(
        *arguments: str | bytes, stdin: bytes = b"", shell: str = 'exec "$@"', redirected: str = "", encoding: str = "utf-8",
        without: tuple[str, ...] = (), **variables: str,
    ) -> Done:  # fmt: skip
        """shell: how bash starts it. redirected: what it is told of the streams, such as `>&-`. without: which variables."""
        environment = {name: value for name, value in settings(gateway, tmp_path).items() if name not in without} | variables
        command: list[Any] = ["bash", "-c", f"{shell} {redirected}", "bash", *LACRE, *arguments]
        done = subprocess.run(command, capture_output=True, check=False, input=stdin, env=environment, timeout=60, cwd=tmp_path)
        return Done(done, encoding)

    return run


class TestSizes:
    @pytest.mark.parametrize("columns", ["0", "²", "9" * 30])
    def test_the_answer_is_whole(self, run: Run, columns: str) -> None:
        assert run(*ASK, COLUMNS=columns, LINES=columns, TERMINAL_WIDTH=columns).answer == WHOLE

    def test_so_are_tables_and_help(self, run: Run, gateway: Gateway) -> None:
        said = run("status", COLUMNS="0").out
        assert "by tiny in" in said and gateway.url.partition("trust=")[2] in said
        assert "status" in run("--help", COLUMNS="0", TERMINAL_WIDTH="none").out
        lines = run("manifest", "show", COLUMNS="20").out.splitlines()  # in a pipe, it is never cut
        assert lines[1].split()[0] == "pool" and lines[2].startswith("default  tiny ")

    @pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
    def test_a_pipe_is_no_terminal(self, run: Run, variable: str) -> None:
        text = "# no\x1b[31m heading\r"
        assert run("chat", "--", text, TERM="xterm-256color", **{variable: "1"}).out == text + "\n"

    @pytest.mark.parametrize("variables", [{"COLUMNS": "0"}, {"TERM": "dumb"}])
    def test_a_terminal_shows_it_all(self, gateway: Gateway, tmp_path: Path, variables: dict[str, str]) -> None:
        text = "A <b>bold</b> word.\n\n<div>a block</div>\n\n[hidden]: http://example.com/\n\nThe end."
        shown = at_terminal([*LACRE, "chat", "--", text], settings(gateway, tmp_path) | {"TERM": "xterm"} | variables)
        for part in ("<b>bold</b>", "<div>a block</div>", "[hidden]: http://example.com/", "The end."):
            assert part in shown


class TestStreams:
    def test_stdin_closed_or_without_end(self, run: Run) -> None:
        assert run(*ASK, redirected="<&-").answer == WHOLE
        assert run("ask", redirected="<&-").code == 1  # nothing was asked
        assert run(*ASK, redirected="</dev/zero").refuses("stdin holds over")

    @pytest.mark.parametrize("redirected", [">&-", ">/dev/full"])
    @pytest.mark.parametrize("arguments", [ASK, ["--version"], ["--help"], ["status", "--json"]])
    def test_an_answer_that_cannot_be_written(self, run: Run, redirected: str, arguments: list[str]) -> None:
        assert run(*arguments, redirected=redirected).refuses("the output cannot be written", "what helps")

    def test_a_reader_that_leaves(self, run: Run) -> None:
        done = run("ask", stdin=b"word " * 300, shell='"$@" | head -c 3 > /dev/null; test "${PIPESTATUS[0]}" = 1')
        assert (done.code, done.said) == (0, "")

    @pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
    def test_messages_that_cannot_be_written_cost_no_answer(self, run: Run, redirected: str) -> None:
        assert run(*ASK, redirected=redirected).answer == WHOLE
        assert run("ask", "x", "--model", "gone", redirected=redirected).code == 7

    def test_ctrl_c_before_a_command_has_begun(self) -> None:
        program = "from lacre.cli.ending import run\ndef begin(): raise KeyboardInterrupt\nrun(begin)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (130, b"")


class TestText:
    @pytest.mark.parametrize(
        ("arguments", "stdin"),
        [
            (["ask", "Summarise."], b"caf\xe9\n"),
            (["chat"], b"caf\xe9\n"),
            (["ask", b"caf\xe9"], b""),
            (["ask", "x", "--system", b"caf\xe9"], b""),
            (["status", "--pool", b"caf\xe9"], b""),
        ],
        ids=str,
    )
    def test_what_is_not_utf8(self, run: Run, arguments: list[str | bytes], stdin: bytes) -> None:
        assert run(*arguments, stdin=stdin).refuses("is not UTF-8 (at byte 4)")

    def test_a_schema_that_is_not_utf8(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "schema.json").write_bytes(b'{"title": "caf\xe9"}')
        assert run(*ASK, "--schema", "schema.json").refuses("schema.json is not UTF-8")

    @pytest.mark.parametrize(
        "variables",
        [
            {"PYTHONIOENCODING": "ascii"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"LC_ALL": "POSIX"},
            {"LC_ALL": "garbage", "LANG": "garbage"},
        ],
    )
    def test_a_pipe_gets_utf8(self, run: Run, variables: dict[str, str]) -> None:
        assert run("ask", "日本 😀", stdin="é\n".encode(), **variables).out == "日本 😀\n\né\n"
        assert json.loads(run("ask", "--json", "日本 😀", **variables).out)["text"] == "日本 😀"

    def test_what_an_encoding_lacks_is_escaped(self, run: Run, gateway: Gateway, tmp_path: Path) -> None:
        latin: dict[str, str] = {"encoding": "latin-1", "PYTHONIOENCODING": "latin-1"}
        assert run("ask", "é 日本", **latin).answer == (0, "é \\u65e5\\u672c\n")
        assert json.loads(run("ask", "--json", "é 日本", **latin).out)["text"] == "é 日本"
        variables = settings(gateway, tmp_path) | {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}
        assert "\\u65e5" in at_terminal([*LACRE, "ask", "日本"], variables)


class TestUsers:
    @pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs another user")
    @pytest.mark.parametrize("arguments", [ASK, ["status"], ["keys", "list"]], ids=" ".join)
    def test_no_home(self, run: Run, arguments: list[str]) -> None:
        other_user = 'cd /; exec setpriv --reuid 54321 --clear-groups "$@"'
        done = run(*arguments, shell=other_user, without=("XDG_STATE_HOME", "HOME"))
        assert done.refuses("no home folder for state: set XDG_STATE_HOME")

    @pytest.mark.parametrize(("blocks", "file"), [(0, "root.pem"), (1, "generations.json")])
    def test_a_disk_that_is_full(self, run: Run, blocks: int, file: str) -> None:
        done = run("keys", "init", "--state", "state", shell=f'ulimit -f {blocks}; exec "$@"')
        assert done.refuses(f"{file} cannot be used (File too large)", "ulimit -f")

    def test_a_state_folder_that_is_a_file(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert run(*ASK, XDG_STATE_HOME=str(tmp_path / "file")).refuses("Not a directory")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["keys", "init", "--state", ""],
            ["up", "--port=0", "--state="],
            ["up", "--port=0", "--state=x", "--model=a.gguf", "--model="],
            ["proxy", "--key-file="],
            ["token", "issue", "--state=x", "--dpop", ""],
            [*ASK, "--schema="],
            ["worker", "--settings="],
        ],
        ids=" ".join,
    )
    def test_an_empty_path_is_not_the_current_folder(self, run: Run, tmp_path: Path, arguments: list[str]) -> None:
        assert run(*arguments).refuses("is an empty path")
        assert not list(tmp_path.iterdir()), "nothing is made there"

    def test_a_folder_that_is_gone(self, run: Run) -> None:
        gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
        assert run("keys", "list", "--state", "here", shell=gone).refuses("No such file or directory")

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            ("ALL_PROXY", "socks://127.0.0.1:7891", "ALL_PROXY: not the URL of a proxy"),
            ("all_proxy", "socks5://127.0.0.1:7891", "all_proxy: a SOCKS proxy needs another package"),
            ("HTTPS_PROXY", "http://[::1", "HTTPS_PROXY: not the URL of a proxy"),
            ("SSL_CERT_FILE", "/nonexistent.pem", "SSL_CERT_FILE: /nonexistent.pem cannot be used (No such file"),
            ("SSL_CERT_FILE", "/etc/hostname", "SSL_CERT_FILE: /etc/hostname cannot be used (it holds no certificate"),
            ("LACRE_URL", f"lacre://a..b?trust={'A' * 43}", "'a..b' is not a host name"),
        ],
    )
    def test_a_variable_that_is_wrong_is_named(self, run: Run, variable: str, value: str, said: str) -> None:
        assert run(*ASK, **{variable: value}).refuses(said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "x", "--schema", "/dev/zero"],
        ["policy", "explain", "/dev/zero"],
        ["audit", "check-receipt", "/dev/zero", "."],
        ["gateway", "--settings", "/dev/zero"],
    ],
    ids=" ".join,
)
def test_a_file_without_end_is_not_read_whole(run: Run, arguments: list[str]) -> None:
    assert run(*arguments, shell='ulimit -v 6000000; exec "$@"').refuses("/dev/zero", "bytes")
