"""The `lacre` command, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lacre
from lacre_backend.models.gguf import find
from parts.up import Up, run
from parts.waiting import wait_until


def test_version_and_every_command() -> None:
    assert run("--version").stdout.strip() == f"lacre {lacre.__version__}"
    text = run("--help").stdout
    for name in ("up", "demo", "chat", "gateway", "worker", "token", "manifest", "keys", "signer", "root"):
        assert f" {name} " in text


@pytest.mark.parametrize(
    ("words", "stdin", "answers"),
    [
        (("Say hello.", "--max-tokens", "8"), "", 1),
        (("--max-tokens", "6"), "Hello.\n\nAnd again.\n", 2),
    ],
    ids=["one", "interactive"],
)
def test_chat(up: Up, words: tuple[str, ...], stdin: str, answers: int) -> None:
    done = run("chat", *words, up=up, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= answers


def manifest(up: Up) -> dict[str, Any]:
    return json.loads(run("manifest", "show", "--json", up=up).stdout)  # type: ignore[no-any-return]


def digests_in(up: Up) -> list[str]:
    return manifest(up)["pools"]["default"]["models"]["smollm2-135m"]["sha256"]  # type: ignore[no-any-return]


def test_manifest_show(up: Up) -> None:
    assert digests_in(up) == [find().digest.removeprefix("sha256:")]
    assert "MLKEM768-X25519" in run("manifest", "show", up=up).stdout


def test_manifest_publish_raises_the_version(up: Up) -> None:
    before = manifest(up)["ver"]
    up.command("manifest", "publish")
    wait_until(lambda: manifest(up)["ver"] > before)


@pytest.mark.slow
def test_routes_are_published_kept_and_removed(own: Up, tmp_path: Path) -> None:
    (routes := tmp_path / "routes.toml").write_text(
        '[routes.assistant]\npools = [{ pool = "default", model = "smollm2-135m" }]\n'
    )
    own.command("manifest", "publish", "--routes", str(routes))
    wait_until(lambda: "routes" in manifest(own))
    version = manifest(own)["ver"]
    own.command("manifest", "publish")
    wait_until(lambda: manifest(own)["ver"] > version)
    done = run("ask", "Hi.", "--model", "assistant", "--max-tokens", "2", "--json", up=own)
    assert json.loads(done.stdout)["model"] == "smollm2-135m", done.stderr
    routes.write_text("[routes.assistant]\npools = []")
    refused = run("manifest", "publish", "--routes", str(routes), "--state", str(own.state), up=own)
    assert refused.returncode == 1 and str(routes) in refused.stderr.replace("\n", "")
    routes.write_text("[routes]")
    own.command("manifest", "publish", "--routes", str(routes))
    wait_until(lambda: "routes" not in manifest(own))


@pytest.mark.slow
def test_up_does_not_start_with_routes_that_lead_nowhere(tmp_path: Path) -> None:
    (routes := tmp_path / "routes.toml").write_text('[[routes.assistant.pools]]\npool = "elsewhere"\n')
    refused = run("up", "--state", str(tmp_path / "state"), "--port", "0", "--routes", str(routes))
    assert refused.returncode == 1 and "no pool 'elsewhere': there are default" in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "state" / "site.json").exists()


@pytest.mark.slow
def test_a_manifest_that_names_another_file(own: Up, tmp_path: Path) -> None:
    """The worker does not serve until the publisher takes that back."""
    (report := tmp_path / "other.json").write_text(json.dumps({"digest": "sha256:" + "0" * 64}))
    health = own.state / "workers" / "default" / "health"

    def publish(named: str, *digests: str) -> None:
        own.command("manifest", "publish", "--model", f"smollm2-135m={named}")
        wait_until(lambda: digests_in(own) == list(digests))

    publish(str(report), "0" * 64)
    wait_until(lambda: "names other files for smollm2-135m" in health.read_text())
    publish("")
    with own.client(pin_models={"smollm2-135m": find().digest}) as client:
        assert client.chat("Hi.", max_tokens=2).receipt.model == find().digest
    with own.client(pin_models={"smollm2-135m": "sha256:" + "0" * 64}) as client, pytest.raises(lacre.WrongModel):
        client.chat("Hi.", max_tokens=2)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_pin_of_the_command(up: Up, command: str) -> None:
    right, wrong = find().digest, "sha256:" + "0" * 64
    words = (command, "Hi.", "--max-tokens", "2")
    done = run(*words, "--pin-model", f"smollm2-135m={right}", up=up, LACRE_PIN_MODELS=f"smollm2-135m={wrong}")
    assert done.returncode == 0, done.stderr
    for refused in (
        run(*words, "--pin-model", f"smollm2-135m={wrong}", up=up),
        run(*words, up=up, LACRE_PIN_MODELS=f"smollm2-135m={wrong}"),
    ):
        assert refused.returncode == 5
        assert "pin_models has" in refused.stderr


def test_keys_list(up: Up) -> None:
    shown = up.command("keys", "list")
    assert [line.count("current since") for line in shown.splitlines() if "default" in line] == [1, 1]
    assert "MLKEM768-X25519" in shown
    assert [row["pool"] for row in json.loads(up.command("keys", "list", "--json"))] == ["default", "default"]


def test_token_issue(up: Up) -> None:
    with up.client(token=up.command("token", "issue", "grace")) as client:
        assert client.chat("Hi.", max_tokens=2).text


def test_errors_say_what_to_do(up: Up, tmp_path: Path) -> None:
    run("keys", "init", "--state", str(tmp_path))
    for words, told in (
        (("chat", "Hi."), "LACRE_URL"),
        (("keys", "rotate", "--state", str(tmp_path)), "lacre up"),  # it has no fabric
        (("keys", "rotate", "--pool", "nowhere", "--state", str(up.state)), "unknown pool nowhere: this state has default"),
    ):
        done = run(*words)
        assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr


@pytest.mark.parametrize("command", ["gateway", "worker"])
def test_settings_errors_name_the_key(tmp_path: Path, command: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('trusted = "x"\n')
    done = run(command, "--settings", str(path))
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert "trusted: unknown key; the nearest known one is 'trust'" in text
    assert "nats: missing" in text


@pytest.mark.slow
def test_demo_as_json() -> None:
    done = run("demo", "--json", "--as-shipped")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert (shown["ok"], shown["kem"], bool(shown["text"])) == (True, "MLKEM768-X25519", True)
    assert all(shown[name] > 0 for name in ("completion_tokens", "ttft_ms", "tokens_per_s"))
    assert shown["sealed_request_bytes"] > 1120


def test_a_token_is_explained_also_a_revoked_one(up: Up) -> None:
    """With what the running NATS knows: models and revocations."""
    token = up.command("token", "issue", "dora").strip()

    def explained() -> dict[str, Any]:
        done = run("token", "check", "-", "--json", "--state", str(up.state), up=up, stdin=token)
        told: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, told["unchecked"]) == (0 if told["accepted"] else 3, [])
        return told

    told = explained()
    assert (told["accepted"], told["principal"]["subject"]) == (True, "dora")
    assert {"action": "chat", "target": "default/smollm2-135m", "most": 32768} in told["may"]
    up.command("revoke", "--sub", "dora")
    told = explained()
    assert (told["accepted"], told["reason"], told["may"]) == (False, "token: revoked", [])


def test_the_doctor_of_workers_and_of_the_gateway(up: Up) -> None:
    for options, check in ((["--worker"], "worker"), ([], "workers default")):
        told = json.loads(run("doctor", *options, "--json", "--state", str(up.state), up=up).stdout)
        found = {finding["check"]: finding["state"] for finding in told["findings"]}
        assert (told["ok"], found.get(check)) == (True, "ok"), told


def test_budgets_name_their_limits_and_when_they_end(up: Up) -> None:
    assert run("ask", "Say hello.", "--max-tokens", "2", up=up).returncode == 0

    def shown() -> list[dict[str, Any]]:
        return [json.loads(line) for line in up.command("budget", "show", "--json").splitlines()]

    wait_until(lambda: any(line["limit"] == "requests_per_minute" for line in shown()))
    [requests, *_] = [line for line in shown() if line["limit"] == "requests_per_minute"]
    assert (requests["ceiling"], requests["currency"], requests["resets_at"] % 60) == (600, None, 0)
    assert ", limit 600, resets at 20" in up.command("budget", "show")
