"""An operator's command that takes a while says at a terminal what it does, and nothing of that to programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.site import Site
from parts.commands import run_lacre
from parts.terminal import at_terminal
from parts.up import LACRE

pytestmark = pytest.mark.slow
# The NATS servers of `site` are away. {} is the test's folder, W names the passphrase's file.
COMMANDS = {
    (
        "reading the state",
        "encrypting the backup",
    ): "state backup {}/new --no-fabric W --state {}/site",
    ("opening the backup", "writing the state"): "state restore {}/kept W --state {}/back",
    ("adding the pool",): "pool add second --model m --state {}/site",
    ("checking the NATS servers",): "fabric check --state {}/site",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = Site(tmp_path / "site", {"default": ("tiny",)})
    site.create()
    about = {"nats": f"nats://127.0.0.1:{free_port()}", "pools": {"default": ["tiny"]}}
    (site.folder / "site.json").write_text(json.dumps(about))
    file = site.credential_file("provisioner")
    file.parent.mkdir(exist_ok=True)
    Credential.new("provisioner").save(file)
    write_secret(tmp_path / "words", b"correct horse battery")
    return tmp_path


@pytest.mark.parametrize("what", COMMANDS, ids=lambda what: what[0])
def test_what_it_does(what: tuple[str, ...], folder: Path) -> None:
    command = [*LACRE, *COMMANDS[what].replace("W", "--passphrase-file {}/words").replace("{}", str(folder)).split()]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "xterm-256color", "COLUMNS": "120"}
    if "restore" in command:
        words = ("--passphrase-file", folder / "words")
        assert run_lacre("state", "backup", folder / "kept", "--no-fabric", "--state", folder / "site", *words).returncode == 0
    shown = at_terminal(command, environment)
    assert [each for each in what if each not in shown] == []
    piped = run_lacre(*command[len(LACRE) :], env=environment)  # it may be refused now
    assert [each for each in what if each in piped.stdout + piped.stderr] == []
