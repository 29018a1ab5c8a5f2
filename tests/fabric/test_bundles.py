"""What each process of a deployment gets: enough to run, and nothing that is another's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lacre.trust import ConnectionString
from lacre_backend import settings as worker
from lacre_fabric.server import executable
from lacre_fabric.site import Site
from lacre_gateway import settings as gateway

COMMAND = ["fabric", "bundles", "--nats=nats://nats:4222", "--public-url=http://127.0.0.1:8321"]
BUNDLES = {
    "nats": {"nats.conf"},
    "gateway": {"gateway.toml", "grant.pem", "credential.json", "issuer.jwks"},
    "worker-default": {"worker.toml", "receipt.pem", "credential.json"},
}


def bundles(state: Path, *options: str) -> str:
    command = [sys.executable, "-P", "-m", "lacre", *COMMAND, f"--state={state}", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    bundles(tmp_path / "state", "--model=small")
    return tmp_path / "state"


def test_a_bundle_holds_what_it_should(state: Path) -> None:
    for name, files in BUNDLES.items():
        found = list((state / "bundles" / name).iterdir())
        assert {path.name for path in found} == files
        assert {path.stat().st_mode & 0o777 for path in found} == {0o600}


def test_no_bundle_holds_another_ones_secrets(state: Path) -> None:
    content = {name: b"".join(path.read_bytes() for path in (state / "bundles" / name).iterdir()) for name in BUNDLES}
    passwords = {path.stem: json.loads(path.read_text())["password"].encode() for path in (state / "fabric").iterdir()}
    assert all(password in content["nats"] for password in passwords.values())
    for name, own in (("gateway", "gateway-g1"), ("worker-default", "worker-default")):
        assert [who for who, password in passwords.items() if password in content[name]] == [own]
    for name in ("root", "signer", "issuer"):
        key = (state / f"{name}.pem").read_bytes().splitlines()[1]
        assert not [bundle for bundle, text in content.items() if key in text]


def test_settings_hold(state: Path) -> None:
    served = gateway.load(state / "bundles" / "gateway" / "gateway.toml")
    assert served.audit.is_absolute()
    assert served.signing_key.exists()
    assert served.nats.credentials.exists()
    node = worker.load(state / "bundles" / "worker-default" / "worker.toml")
    assert node.models[0].path == Path("/models/small.gguf")
    assert node.receipt_key.exists()
    assert node.health is not None
    check = [executable(), "-t", "-c", str(state / "bundles" / "nats" / "nats.conf")]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0


def test_again_keeps_the_keys(state: Path) -> None:
    before = {path: path.read_bytes() for path in state.rglob("*.pem")}
    url = bundles(state, "--model=small")
    assert {path: path.read_bytes() for path in state.rglob("*.pem")} == before
    assert ConnectionString.parse(url).root == Site.load(state).root
