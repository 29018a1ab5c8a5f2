"""A token that is bound to a key, and one that is revoked, on a whole Lacre."""

from __future__ import annotations

import stat
import subprocess
import time
from pathlib import Path

import pytest

import lacre
from parts.up import LACRE, Up, environment


def lacre_command(up: Up, *arguments: str, **variables: str) -> str:
    command = [*LACRE, *arguments]
    env = environment(up.state) | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def asked(up: Up, token: str, key: lacre.ProofKey | None = None) -> str:
    with lacre.Client(up.url, token=token, dpop=key, memory=lacre.VersionMemory()) as client:
        return client.chat("Name a sea.", max_tokens=2).text


@pytest.mark.slow
def test_a_bound_token(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    token, other = (lacre_command(up, "token", "issue", "ada", "--dpop", str(path), "--state", str(up.state)) for _ in range(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = lacre.ProofKey.load(path)
    assert asked(up, token, key) and asked(up, other, key)
    for wrong in (None, lacre.ProofKey.generate()):
        with pytest.raises(lacre.Unauthenticated, match="bound to a key"):
            asked(up, token, wrong)
    # The command takes the key from its environment.
    told = {"LACRE_URL": up.url, "LACRE_TOKEN": token}
    assert lacre_command(up, "chat", "Name a sea.", "--max-tokens", "2", **told, LACRE_DPOP_KEY=str(path))


def test_revoked(up: Up) -> None:
    token = lacre_command(up, "token", "issue", "bob", "--state", str(up.state))
    assert asked(up, token)
    assert "revoked until" in lacre_command(up, "revoke", "--sub", "bob", "--state", str(up.state))
    deadline = time.monotonic() + 10
    while True:
        try:
            asked(up, token)
        except lacre.Unauthenticated:
            break
        assert time.monotonic() < deadline
    assert asked(up, up.token)  # others are not meant
