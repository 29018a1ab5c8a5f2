"""NATS passwords are replaced while requests run, in either order of file and server; none fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_fabric.nats.login import Login
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate.commands import fabric_app
from parts.chat_app import ChatApp
from parts.stage import LiveStage
from parts.stage.steady import SteadyLoad


def replaced(live: LiveStage, names: Sequence[str]) -> None:
    """By the command, as an operator does it."""
    for name in names:
        before = live.site.credential(name)
        done = CliRunner().invoke(fabric_app, ["replace", name, "--state", str(live.site.folder)])
        assert done.exit_code == 0, done.output
        assert live.site.credential(name) != before


@pytest.mark.slow
async def test_passwords_under_a_steady_load(tmp_path: Path) -> None:
    """The gateway's, the worker's and the provisioner's, twice, with the SDK's own patience and no more."""
    async with LiveStage.on_air(tmp_path, ChatApp()) as live:
        names = sorted({role.credential.name for role in live.site.roles()})
        async with SteadyLoad.on(live) as load:
            for _ in range(2):
                replaced(live, names)
                await load.more()  # the files are new, and the server still has the old passwords
                live.server.configure(live.site.roles())
                live.server.reload(live.nats)
                await load.more()
        assert load.failed == {}
        said = live.gateways[0].log.read_text()
        assert '"fabric.password_replaced"' in said
        assert '"fabric lost"' not in said  # the gateway kept all of its state


def test_an_unknown_credential_is_named(tmp_path: Path) -> None:
    live = LiveStage(tmp_path)
    live.site.save("nats://127.0.0.1:4222", "http://127.0.0.1:8321")
    live.site.credential("gateway-g1")
    done = CliRunner().invoke(fabric_app, ["replace", "gateway-g9", "--state", str(live.site.folder)])
    assert isinstance(done.exception, SettingsError)
    assert "choose one of gateway-g1" in str(done.exception)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Credential("a", "one").save(tmp_path / "a.json")
    return tmp_path / "a.json"


def test_both_passwords_are_tried_in_turn(file: Path) -> None:
    """Until a server takes the newest one; then there is no other."""
    login = Login(Credential.load(file))
    assert [login.next().password for _ in range(2)] == ["one", "one"]
    assert not login.has_other()
    Credential("a", "two").save(file)
    assert login.has_other()
    assert [login.next().password for _ in range(4)] == ["two", "one", "two", "one"]
    login.accepted()
    assert login.has_other()
    assert login.next().password == "two"
    login.accepted()
    assert not login.has_other()
    assert [login.next().password for _ in range(2)] == ["two", "two"]


@pytest.mark.parametrize("content", ["", "{", '{"name": "b", "password": "two"}', "gone"])
def test_a_file_that_cannot_be_used_changes_nothing(file: Path, content: str) -> None:
    login = Login(Credential.load(file))
    file.unlink() if content == "gone" else file.write_text(content)
    assert login.next().password == "one"
    assert not login.has_other()
    Credential("a", "two").save(file)
    assert login.next().password == "two"


def test_a_file_that_others_can_read_changes_nothing(file: Path) -> None:
    login = Login(Credential.load(file))
    Credential("a", "two").save(file)
    file.chmod(0o644)
    assert login.next().password == "one"
