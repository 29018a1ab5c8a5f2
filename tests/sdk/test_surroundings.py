"""The `lacre` command in odd surroundings: streams closed, full or not UTF-8, a terminal of no size, a user of no home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.relay import Relay
from parts.terminal import at_terminal
from parts.up import LACRE

ANSWER = "The sea is wide.\n"
ASK = ["ask", ANSWER.strip()]  # the engine says what it was asked


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=2048)
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live
    engine.close()


def run(
    gateway: Gateway, home: Path, *arguments: str | bytes, stdin: bytes = b"", redirected: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """redirected: what a shell is told of the streams, such as `>&-`."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", *LACRE, *arguments]
    environment = settings(gateway, home) | variables
    done = subprocess.run(command, check=False, capture_output=True, input=stdin, env=environment, timeout=60, cwd=home)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


class TestSizes:
    @pytest.mark.parametrize("columns", ["0", "²", "9" * 30])
    def test_the_answer_is_whole(self, gateway: Gateway, tmp_path: Path, columns: str) -> None:
        done = run(gateway, tmp_path, *ASK, COLUMNS=columns, LINES=columns, TERMINAL_WIDTH=columns)
        assert (done.returncode, done.stdout.decode()) == (0, ANSWER)

    def test_so_are_tables_and_help(self, gateway: Gateway, tmp_path: Path) -> None:
        said = run(gateway, tmp_path, "status", COLUMNS="0").stdout.decode()
        assert "by tiny in" in said and gateway.url.partition("trust=")[2] in said
        assert "status" in run(gateway, tmp_path, "--help", COLUMNS="0", TERMINAL_WIDTH="none").stdout.decode()

    def test_a_table_in_a_pipe_is_never_cut(self, gateway: Gateway, tmp_path: Path) -> None:
        lines = run(gateway, tmp_path, "manifest", "show", COLUMNS="20").stdout.decode().splitlines()
        assert lines[1].split()[0] == "pool"
        assert lines[2].startswith("default  tiny ")

    @pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
    def test_a_pipe_is_no_terminal(self, gateway: Gateway, tmp_path: Path, variable: str) -> None:
        text = "# no\x1b[31m heading\r"
        done = run(gateway, tmp_path, "chat", "--", text, TERM="xterm-256color", **{variable: "1"})
        assert done.stdout.decode() == text + "\n"

    @pytest.mark.parametrize("variables", [{"COLUMNS": "0"}, {"TERM": "dumb"}])
    def test_a_terminal_shows_it_all(self, gateway: Gateway, tmp_path: Path, variables: dict[str, str]) -> None:
        text = "A <b>bold</b> word.\n\n<div>a block</div>\n\n[hidden]: http://example.com/\n\nThe end."
        shown = at_terminal([*LACRE, "chat", "--", text], settings(gateway, tmp_path) | {"TERM": "xterm"} | variables)
        for part in ("<b>bold</b>", "<div>a block</div>", "[hidden]: http://example.com/", "The end."):
            assert part in shown


class TestStreams:
    def test_stdin_closed(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, *ASK, redirected="<&-")
        assert (done.returncode, done.stdout.decode()) == (0, ANSWER)
        assert run(gateway, tmp_path, "ask", redirected="<&-").returncode == 1  # nothing was asked

    def test_stdin_without_end(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, *ASK, redirected="</dev/zero")
        assert done.returncode == 1
        assert b"stdin holds over" in done.stderr

    @pytest.mark.parametrize("redirected", [">&-", ">/dev/full"])
    @pytest.mark.parametrize("arguments", [ASK, ["--version"], ["--help"], ["status", "--json"]])
    def test_an_answer_that_cannot_be_written(
        self, gateway: Gateway, tmp_path: Path, redirected: str, arguments: list[str]
    ) -> None:
        done = run(gateway, tmp_path, *arguments, redirected=redirected)
        assert done.returncode == 1
        assert b"the output cannot be written" in done.stderr and b"what helps" in done.stderr

    def test_a_reader_that_leaves(self, gateway: Gateway, tmp_path: Path) -> None:
        script = '"$@" | head -c 3 > /dev/null; test "${PIPESTATUS[0]}" = 1'
        command = ["bash", "-c", script, "bash", *LACRE, "ask"]
        environment = settings(gateway, tmp_path)
        done = subprocess.run(command, check=False, capture_output=True, input=b"word " * 300, env=environment, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
    def test_messages_that_cannot_be_written_cost_no_answer(self, gateway: Gateway, tmp_path: Path, redirected: str) -> None:
        done = run(gateway, tmp_path, *ASK, redirected=redirected)
        assert (done.returncode, done.stdout.decode()) == (0, ANSWER)
        assert run(gateway, tmp_path, "ask", "x", "--model", "gone", redirected=redirected).returncode == 7


class TestText:
    def test_stdin_that_is_not_utf8(self, gateway: Gateway, tmp_path: Path) -> None:
        for command in (["ask", "Summarise."], ["chat"]):
            done = run(gateway, tmp_path, *command, stdin=b"caf\xe9\n")
            assert done.returncode == 1
            assert b"is not UTF-8 (at byte 4)" in done.stderr

    def test_an_argument_that_is_not_utf8(self, gateway: Gateway, tmp_path: Path) -> None:
        for arguments in (["ask", b"caf\xe9"], ["ask", "x", "--system", b"caf\xe9"], ["status", "--pool", b"caf\xe9"]):
            done = run(gateway, tmp_path, *arguments)
            assert done.returncode == 1
            assert b"is not UTF-8 (at byte 4)" in done.stderr

    def test_a_schema_that_is_not_utf8(self, gateway: Gateway, tmp_path: Path) -> None:
        (tmp_path / "schema.json").write_bytes(b'{"title": "caf\xe9"}')
        done = run(gateway, tmp_path, *ASK, "--schema", "schema.json")
        assert done.returncode == 1
        assert b"schema.json is not UTF-8" in done.stderr

    @pytest.mark.parametrize(
        "variables",
        [
            {"PYTHONIOENCODING": "ascii"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"LC_ALL": "POSIX"},
            {"LC_ALL": "garbage", "LANG": "garbage"},
        ],
    )
    def test_a_pipe_gets_utf8(self, gateway: Gateway, tmp_path: Path, variables: dict[str, str]) -> None:
        done = run(gateway, tmp_path, "ask", "日本 😀", stdin="é\n".encode(), **variables)
        assert done.stdout.decode() == "日本 😀\n\né\n"
        told = json.loads(run(gateway, tmp_path, "ask", "--json", "日本 😀", **variables).stdout)
        assert told["text"] == "日本 😀"

    def test_what_an_encoding_lacks_is_escaped(self, gateway: Gateway, tmp_path: Path) -> None:
        done = run(gateway, tmp_path, "ask", "é 日本", PYTHONIOENCODING="latin-1")
        assert (done.returncode, done.stdout.decode("latin-1")) == (0, "é \\u65e5\\u672c\n")
        told = run(gateway, tmp_path, "ask", "--json", "é 日本", PYTHONIOENCODING="latin-1").stdout
        assert json.loads(told.decode("latin-1"))["text"] == "é 日本"

    def test_a_terminal_that_is_not_utf8(self, gateway: Gateway, tmp_path: Path) -> None:
        variables = settings(gateway, tmp_path) | {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}
        assert "\\u65e5" in at_terminal([*LACRE, "ask", "日本"], variables)


class TestUsers:
    @pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs another user")
    def test_no_home(self, gateway: Gateway, tmp_path: Path) -> None:
        environment = settings(gateway, tmp_path)
        del environment["XDG_STATE_HOME"], environment["HOME"]
        for arguments in (ASK, ["status"], ["keys", "list"]):
            command = ["setpriv", "--reuid", "54321", "--clear-groups", *LACRE, *arguments]
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
            assert (done.returncode, "Traceback" in done.stderr) == (1, False)
            assert "no home folder for state: set XDG_STATE_HOME" in " ".join(done.stderr.split())

    @pytest.mark.parametrize(("blocks", "file"), [(0, "root.pem"), (1, "generations.json")])
    def test_a_disk_that_is_full(self, gateway: Gateway, tmp_path: Path, blocks: int, file: str) -> None:
        command = [
            "sh",
            "-c",
            f'ulimit -f {blocks}; exec "$@"',
            "sh",
            *LACRE,
            "keys",
            "init",
            "--state",
            str(tmp_path / "state"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert f"{file} cannot be used (File too large)" in done.stderr and "ulimit -f" in done.stderr

    def test_a_state_folder_that_is_a_file(self, gateway: Gateway, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        done = run(gateway, tmp_path, *ASK, XDG_STATE_HOME=str(tmp_path / "file"))
        assert done.returncode == 1
        assert b"Not a directory" in done.stderr

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
    def test_an_empty_path_is_not_the_current_folder(self, gateway: Gateway, tmp_path: Path, arguments: list[str]) -> None:
        done = run(gateway, tmp_path, *arguments)
        assert done.returncode == 1
        assert b"is an empty path" in done.stderr
        assert not list(tmp_path.iterdir()), "nothing is made there"

    def test_a_folder_that_is_gone(self, gateway: Gateway, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        command = ["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh", *LACRE, "keys", "list", "--state", "here"]
        gone.mkdir()
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=settings(gateway, tmp_path), timeout=60)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "No such file or directory" in done.stderr

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
    def test_a_variable_that_is_wrong_is_named(
        self, gateway: Gateway, tmp_path: Path, variable: str, value: str, said: str
    ) -> None:
        done = run(gateway, tmp_path, *ASK, **{variable: value})
        assert done.returncode == 1
        assert said in " ".join(done.stderr.decode().split())


@pytest.mark.parametrize(
    "arguments",
    [["ask", "x", "--schema"], ["policy", "explain"], ["audit", "check-receipt"], ["gateway", "--settings"]],
    ids=" ".join,
)
def test_a_file_without_end_is_not_read_whole(tmp_path: Path, arguments: list[str]) -> None:
    more = [str(tmp_path)] if "check-receipt" in arguments else []
    command = ["sh", "-c", 'ulimit -v 6000000; exec "$@"', "sh", *LACRE, *arguments, "/dev/zero", *more]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "/dev/zero" in done.stderr and "bytes" in done.stderr
