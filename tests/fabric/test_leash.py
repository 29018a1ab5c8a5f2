"""Children that end with their parent, and the private nats-server that is one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.nats import roles
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate import nats_conf
from lacre_fabric.operate.leash import leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from parts.fabric import LiveFabric

# Starts a child on a leash, says its process id, and waits to be killed.
PARENT = (
    "import subprocess, sys, time; from lacre_fabric.operate.leash import leashed;"
    "command = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'];"
    "print(subprocess.Popen(leashed(command)).pid, flush=True);"
    "time.sleep(60)"
)


def alive(pid: int) -> bool:
    """Not a zombie either, which is what an orphan is until whoever inherits it looks."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@contextmanager
def parent(code: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that says the id of its child, which lives."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert alive(child)
        yield process, child


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent(number: signal.Signals) -> None:
    with parent(PARENT) as (process, child):
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n", "the child runs its command"
        process.send_signal(number)
    assert gone(child)


def test_a_child_outlives_the_leash_where_the_parent_lives() -> None:
    with subprocess.Popen(leashed([sys.executable, "-c", "import os; print(os.getpid())"]), stdout=subprocess.PIPE) as child:
        out, _ = child.communicate(timeout=20)
    assert (child.returncode, int(out)) == (0, child.pid), "the command has the process id that was started"


def test_a_parent_that_is_gone_already() -> None:
    """It died between the fork and the leash: the command does not run."""
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        pass
    command = [sys.executable, "-m", "lacre_fabric.operate.leash", str(other.pid), sys.executable, "-c", "print('ran')"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.fixture
def configured(tmp_path: Path) -> NatsServer:
    server = NatsServer(tmp_path / "nats", free_port())
    server.configure([roles.provisioner(Credential.new("provisioner")), roles.worker(Credential.new("w"), "a", "n1")])
    return server


@contextmanager
def started(server: NatsServer, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = server.start(log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def test_the_server_keeps_to_itself(configured: NatsServer, tmp_path: Path) -> None:
    """It listens on loopback alone, and no password is in its log, its command line or a file of others."""
    folder, config = configured._folder, configured._folder / "nats.conf"
    assert list(folder.iterdir()) == [config]
    assert (folder.stat().st_mode & 0o777, config.stat().st_mode & 0o777) == (0o700, 0o600)
    passwords = [word for word in config.read_text().split('"') if len(word) == 43 and "." not in word]
    assert len(passwords) == 2
    with started(configured, tmp_path / "nats.log") as process:
        tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
        listening = [line.split() for table in tables for line in table]
        at = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{configured.port:04X}")]
        assert at == [f"0100007F:{configured.port:04X}"]
        seen = (tmp_path / "nats.log").read_text()
        seen += "".join(Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "environ"))
    assert "Server is ready" in seen
    assert not [password for password in passwords if password in seen]


def test_a_taken_port_is_said(configured: NatsServer, tmp_path: Path) -> None:
    """Though it answers: passwords are sent to no other process."""
    with socket.create_server(("127.0.0.1", configured.port)):
        with pytest.raises(SettingsError, match=r"(?s)nats-server did not start.*address already in use"):
            configured.start(tmp_path / "nats.log")


def test_a_wrong_configuration_is_said(configured: NatsServer, tmp_path: Path) -> None:
    (configured._folder / "nats.conf").write_text("port: [")
    with pytest.raises(SettingsError, match="nats-server did not start"):
        configured.start(tmp_path / "nats.log")


def test_the_server_dies_with_who_started_it(configured: NatsServer, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lacre_fabric.operate.nats_server import NatsServer;"
        "process = NatsServer(Path(sys.argv[1]), int(sys.argv[2])).start(Path(sys.argv[3]));"
        "print(process.pid, flush=True); time.sleep(60)"
    )
    with parent(code, configured._folder, configured.port, tmp_path / "nats.log") as (process, child):
        process.kill()
    assert gone(child)


# What we write of nats-server's configuration, nats-server reads: whatever a folder is called.


NAMES = [
    *("José", "模型 😀", "two words", "it's", 'q"uo\\te', "new\nline", "$HOME", "# {hash}; [x]", "tab\t\x7f\x01"),
    os.fsdecode(b"\xff"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_server_runs_in_any_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    with LiveFabric.running(folder):
        assert (folder / "jetstream").is_dir(), "its store is in this folder, and in no other"


def test_plain_text_is_json_too() -> None:
    config = {"a": 1, "b": [True, "x", {}, []], "c": {"d": {"e": "f"}}, "g": 1.5}
    assert json.loads(nats_conf.encode(config)) == config


def test_bytes_beyond_ascii_are_one_escape_each() -> None:
    assert nats_conf.encode({"a": 'é"\\\n'}).split(b": ")[1].strip(b"\n}") == rb'"\xC3\xA9\x22\x5C\x0A"'


@pytest.mark.parametrize("config", [{"é": 1}, {'a"': 1}, {"": 1}, {"a": None}, {"a": b"x"}, {"a": "\ud800"}])
def test_what_the_format_cannot_hold(config: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        nats_conf.encode(config)
