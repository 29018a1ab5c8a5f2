"""Children that end with their parent, and the private nats-server that is one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.nats import roles
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate.leash import leashed
from lacre_fabric.operate.nats_server import NatsServer

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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "1\n", "the child runs its command"
        assert alive(child)
        parent.send_signal(number)
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
def configured(tmp_path: Path, unused_port: int) -> NatsServer:
    server = NatsServer(tmp_path / "nats", unused_port)
    server.configure([roles.provisioner(Credential.new("provisioner")), roles.worker(Credential.new("w"), "a", "n1")])
    return server


@pytest.fixture
def started(configured: NatsServer, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = configured.start(tmp_path / "nats.log")
    yield process
    process.terminate()
    process.wait(10)


def test_the_passwords_are_nobody_s_business(configured: NatsServer) -> None:
    assert [path.name for path in configured._folder.iterdir()] == ["nats.conf"]
    for path, mode in ((configured._folder, 0o700), (configured._folder / "nats.conf", 0o600)):
        assert path.stat().st_mode & 0o777 == mode


def test_the_server_listens_on_loopback_alone(configured: NatsServer, started: subprocess.Popen[bytes]) -> None:
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    at = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{configured.port:04X}")]
    assert at == [f"0100007F:{configured.port:04X}"]
    assert started.poll() is None


def test_no_password_reaches_the_log_or_the_command_line(
    configured: NatsServer, started: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    passwords = [
        word for word in (configured._folder / "nats.conf").read_text().split('"') if len(word) == 43 and "." not in word
    ]
    assert len(passwords) == 2
    seen = (tmp_path / "nats.log").read_text() + Path(f"/proc/{started.pid}/cmdline").read_text()
    seen += Path(f"/proc/{started.pid}/environ").read_text()
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
    arguments = [str(configured._folder), str(configured.port), str(tmp_path / "nats.log")]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        os.kill(parent.pid, signal.SIGKILL)
    assert gone(child)
