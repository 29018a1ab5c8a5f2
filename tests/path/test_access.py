"""A token that is bound to a key, and one that is revoked, on a whole Lacre."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import lacre
from parts.up import Up, run
from parts.waiting import wait_until


def asked(up: Up, token: str, key: lacre.ProofKey | None = None) -> str:
    with up.client(token=token, dpop=key) as client:
        return client.chat("Name a sea.", max_tokens=2).text


@pytest.mark.slow
def test_a_bound_token(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    token, other = (up.command("token", "issue", "ada", "--dpop", str(path)) for _ in range(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = lacre.ProofKey.load(path)
    assert asked(up, token, key) and asked(up, other, key)
    with up.client(token=token, dpop=key) as client:
        assert {each.limit for each in client.usage().limits} == {"requests_per_minute", "concurrent_streams"}
    for wrong in (None, lacre.ProofKey.generate()):
        with pytest.raises(lacre.Unauthenticated, match="bound to a key"):
            asked(up, token, wrong)
        with pytest.raises(lacre.Unauthenticated, match="bound to a key"), up.client(token=token, dpop=wrong) as client:
            client.usage()
    # The command takes the key from its environment.
    told = run("chat", "Name a sea.", "--max-tokens", "2", up=up, LACRE_TOKEN=token, LACRE_DPOP_KEY=str(path))
    assert told.returncode == 0 and told.stdout.strip(), told.stderr
    told = run("usage", up=up, LACRE_TOKEN=token, LACRE_DPOP_KEY=str(path))
    assert told.returncode == 0 and "requests_per_minute" in told.stdout, told.stderr


def test_revoked(up: Up) -> None:
    token = up.command("token", "issue", "bob")
    assert asked(up, token)
    assert "revoked until" in up.command("revoke", "--sub", "bob")

    def refused() -> bool:
        try:
            return not asked(up, token)
        except lacre.Unauthenticated:
            return True

    wait_until(refused)
    assert asked(up, up.token)  # others are not meant
