"""What `lacre doctor` prints: whole words at any width and in pipes; and what it says of workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.doctor.findings import Finding, State
from lacre_gateway.doctor.report import wrapped
from parts.stage import Stage
from parts.terminal import at_terminal

DOCTOR = [sys.executable, "-P", "-m", "lacre", "doctor"]
STYLE = re.compile(r"\x1b\[[0-9;]*m")
LONG = Finding(
    "nats.credentials", State.FAILED,
    "cannot read /var/lib/lacre/state/credentials/gateway.creds: No such file or directory. `lacre up` creates such files",
    "check that NATS runs there, and that it knows the credential in nats.credentials; see docs/nats.md",
)  # fmt: skip
FOUND = [
    Finding("tls", State.OK, "valid"),
    LONG,
    Finding("manifest, queues, workers, clock", State.SKIPPED, "needs the fabric"),
]


def words(finding: Finding) -> list[str]:
    remedy = f"what to do: {finding.remedy}" if finding.remedy else ""
    return steady(f"{finding.state} {finding.check} {finding.detail} {remedy}")


def steady(text: str) -> list[str]:
    """Its words, without the free space, which changes meanwhile."""
    return re.sub(r"[0-9.]+ GiB", "0 GiB", text).split()


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120, 400])
def test_lines_break_between_words_only(width: int) -> None:
    for finding in FOUND:
        lines = list(wrapped(finding, 16, width))
        assert steady(" ".join(lines)) == words(finding)
        too_long = [line for line in lines if len(line) > width]
        assert all(len(line.split()) == 1 or line == lines[0] == f"{finding.state:<7}  {finding.check}" for line in too_long)


def test_a_terminal_of_80_columns_and_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(Stage().settings_text())  # whose other files are missing
    command = [*DOCTOR, "--settings", str(tmp_path / "gateway.toml")]
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"}
    told = json.loads(subprocess.run([*command, "--json"], check=False, capture_output=True, text=True).stdout)
    found = [Finding(**{**each, "state": State(each["state"])}) for each in told["findings"]]
    assert {"failed", "skipped", "ok"} <= {finding.state for finding in found} and not told["ok"]
    drawn = STYLE.sub("", at_terminal(command, environment)).replace("\r", "")
    shown = re.sub("(\x1b\\[[?0-9]*[A-Zhl]|[\u2800-\u28ff] checking)+\n?", "", drawn).split("\n")  # the spinner: it is erased
    assert max(len(line) for line in shown if len(line.split()) > 3) <= 80  # a long path may stand alone behind its check
    assert steady(" ".join(shown)) == [word for finding in found for word in words(finding)]
    piped = subprocess.run(command, check=False, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert len(piped) == len(found)
    for line, finding in zip(piped, found, strict=True):
        assert steady(line.replace(" | ", " ")) == words(finding)


def test_a_worker(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text('pool = "default"\n')
    command = [*DOCTOR, "--worker", "--json", "--settings", str(tmp_path / "worker.toml")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    told = json.loads(done.stdout)
    [finding] = told["findings"]
    assert (done.returncode, told["ok"], finding["check"], finding["state"]) == (1, False, "worker settings", "failed")
    assert "worker.toml" in finding["detail"] and finding["remedy"]


def test_a_nats_that_is_away_leaves_only_json_on_stdout(tmp_path: Path) -> None:
    """The connection's own warnings go elsewhere."""
    Credential.new("gateway").save(tmp_path / "gateway.creds")
    (tmp_path / "gateway.toml").write_text(Stage().settings_text().replace("4222", str(free_port())))
    done = subprocess.run([*DOCTOR, "--json", "--settings", str(tmp_path / "gateway.toml")], check=False, capture_output=True)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "nothing listens there" in found["fabric"]["detail"]
