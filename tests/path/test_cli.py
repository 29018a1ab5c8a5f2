"""The `lacre` command, as it is typed."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

import lacre
from parts.up import LACRE, Up, environment


def run(*arguments: str, up: Up | None = None, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    variables = environment(up.state if up else Path("/nonexistent/x")) | env
    if up is not None:
        variables |= {"LACRE_URL": up.url, "LACRE_TOKEN": up.token}
    return subprocess.run(
        [*LACRE, *arguments], check=False, capture_output=True, text=True, timeout=90, env=variables, input=stdin
    )


def test_version() -> None:
    assert run("--version").stdout.strip() == f"lacre {lacre.__version__}"


def test_every_command_is_there() -> None:
    text = run("--help").stdout
    for name in ("up", "demo", "chat", "gateway", "worker", "token", "manifest", "keys", "signer", "root"):
        assert f" {name} " in text


def test_chat(up: Up) -> None:
    done = run("chat", "Say hello.", "--max-tokens", "8", up=up)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_interactive_chat(up: Up) -> None:
    done = run("chat", "--max-tokens", "6", up=up, stdin="Hello.\n\nAnd again.\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2


def test_manifest_show(up: Up) -> None:
    shown = json.loads(run("manifest", "show", "--json", up=up).stdout)
    assert shown["pools"]["default"]["models"] == ["smollm2-135m"]
    assert "MLKEM768-X25519" in run("manifest", "show", up=up).stdout


def test_manifest_publish_raises_the_version(up: Up) -> None:
    before = json.loads(run("manifest", "show", "--json", up=up).stdout)["ver"]
    done = run("manifest", "publish", "--state", str(up.state), up=up)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if json.loads(run("manifest", "show", "--json", up=up).stdout)["ver"] > before:
            return
    pytest.fail("the gateway did not take up the new manifest")


def test_keys_list(up: Up) -> None:
    shown = run("keys", "list", "--state", str(up.state)).stdout
    assert [line.count("current since") for line in shown.splitlines() if "default" in line] == [1, 1]
    assert "MLKEM768-X25519" in shown
    listed = json.loads(run("keys", "list", "--json", "--state", str(up.state)).stdout)
    assert [row["pool"] for row in listed] == ["default", "default"]


def test_keys_of_a_pool_that_is_not_there(up: Up) -> None:
    done = run("keys", "rotate", "--pool", "nowhere", "--state", str(up.state))
    assert done.returncode == 1
    assert "unknown pool nowhere: this state has default" in done.stderr


def test_keys_without_a_fabric(tmp_path: Path) -> None:
    run("keys", "init", "--state", str(tmp_path))
    done = run("keys", "rotate", "--state", str(tmp_path))
    assert done.returncode == 1
    assert "lacre up" in done.stderr


def test_token_issue(up: Up) -> None:
    token = run("token", "issue", "grace", "--state", str(up.state), up=up).stdout.strip()
    with lacre.Client(up.url, token=token, memory=lacre.VersionMemory()) as client:
        assert client.chat("Hi.", max_tokens=2).text


def test_errors_say_what_to_do() -> None:
    done = run("chat", "Hi.")
    assert done.returncode == 1
    assert "LACRE_URL" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["gateway", "worker"])
def test_settings_errors_name_the_key(tmp_path, command: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('trusted = "x"\n')
    done = run(command, "--settings", str(path))
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert "trusted: unknown key; the nearest known one is 'trust'" in text
    assert "nats: missing" in text


@pytest.mark.slow
def test_demo_as_json() -> None:
    done = run("demo", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["ok"] is True
    assert shown["text"]
    assert shown["kem"] == "MLKEM768-X25519"
    assert shown["completion_tokens"] > 0
    assert shown["ttft_ms"] > 0
    assert shown["tokens_per_s"] > 0
    assert shown["sealed_request_bytes"] > 1120
