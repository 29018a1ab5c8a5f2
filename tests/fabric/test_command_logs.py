"""Log lines of the operator's commands: on stderr, and by the rules of every other log. And their help."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import structlog
import typer
from rich.text import Text
from typer.testing import CliRunner

from lacre import cli
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.site import Site
from parts.up import LACRE


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Of a site whose NATS servers are away."""
    site = Site(tmp_path / "state", {"default": ("tiny",)})
    site.create()
    (site.folder / "site.json").write_text(
        json.dumps({"nats": f"nats://127.0.0.1:{free_port()}", "pools": {"default": ["tiny"]}})
    )
    file = site.credential_file("provisioner")
    file.parent.mkdir(exist_ok=True)
    Credential.new("provisioner").save(file)
    return site.folder


def test_a_line_goes_to_stderr_with_known_fields_alone(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.register()
    assert CliRunner().invoke(cli.app, ["keys", "list", "--state", str(state)]).exit_code == 0
    log = structlog.get_logger("lacre.test")
    log.info("of no interest")
    log.warning("it happened", pool="default", secret="s3cret")
    said = capsys.readouterr()
    assert said.out == ""
    line = json.loads(said.err)
    assert (line["event"], line["level"], line["pool"]) == ("it happened", "warning", "default")
    assert "s3cret" not in said.err


def test_help_is_shown_as_it_was_written() -> None:
    """rich takes a word between brackets for markup, and shows nothing of it."""
    cli.register()
    written, left = list[str](), [typer.main.get_command(cli.app)]
    while left:
        command = left.pop()
        left += getattr(command, "commands", {}).values()
        written += [command.help or "", command.epilog or "", *(getattr(each, "help", None) or "" for each in command.params)]
    assert len(written) > 300
    assert [text for text in written if Text.from_markup(text).plain != text] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [("budget", "show", "--json"), ("manifest", "publish"), ("keys", "tend")])
def test_what_a_command_says_of_absent_servers(state: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*LACRE, *command, "--state", str(state)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    *told, error = done.stderr.splitlines()
    assert error.startswith("error: cannot connect to NATS")
    as_json = json.loads(done.stdout)["error"]["message"] if "--json" in command else done.stdout
    assert (done.returncode, as_json) == (1, error.removeprefix("error: ") if "--json" in command else "")
    assert {json.loads(line)["event"] for line in told} == {"fabric.error"}
