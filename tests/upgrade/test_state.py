"""What one version left on the disk is read by the other: a state folder, its audit log, its backup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parts.up import Up
from parts.versions import Version, previous, this

pytestmark = pytest.mark.slow
SECRET = "correct horse battery"


@pytest.fixture(scope="module")
def old() -> Version:
    return previous()


def ran(version: Version, state: Path) -> dict[str, object]:
    """`lacre up` of that version on the folder, a chat of its own SDK, and what its manifest and audit log are then."""
    with Up.start(state, lacre=[*version.running, "lacre"]) as up:
        for name, pid in up.children().items():
            path = Path(f"/proc/{pid}/environ").read_bytes()
            assert name == "nats-server" or f"PYTHONPATH={version.sources}/".encode() in path
        url = {"LACRE_URL": up.url, "LACRE_TOKEN": up.token, "XDG_STATE_HOME": str(state.parent / "xdg")}
        assert version.lacre("ask", "Hi.", "--max-tokens", "2", **url)
        manifest = json.loads(version.lacre("manifest", "show", "--json", **url))
        version.lacre("fabric", "check", "--state", str(state))
        assert up.stop() == 0
    audit = json.loads(version.lacre("audit", "verify", str(state / "gateway" / "audit"), "--json"))
    assert audit["ok"]
    return {"version": manifest["ver"], "root": up.url.partition("?")[2], "requests": audit["requests"]}


@pytest.mark.timeout(300)
def test_a_state_folder_goes_there_and_back(old: Version, tmp_path: Path) -> None:
    """One `lacre up` after the other, with the same root, the same remembered manifests and one audit log."""
    new, state = this(), tmp_path / "state"
    found = [ran(version, state) for version in (old, new, old)]
    assert len({each["root"] for each in found}) == 1
    assert [each["requests"] for each in found] == [1, 2, 3]
    versions = [each["version"] for each in found]
    assert versions == sorted(set(versions)), "each signed a newer manifest than the one before"


@pytest.mark.parametrize("order", ["old-new", "new-old"])
def test_a_backup_is_restored_by_the_other_version(old: Version, tmp_path: Path, order: str) -> None:
    first, second = (old, this()) if order == "old-new" else (this(), old)
    state, back, file, secret = (tmp_path / name for name in ("state", "back", "site.backup", "secret"))
    secret.touch(0o600)
    secret.write_text(SECRET)
    first.lacre("keys", "init", "--state", str(state))
    site = {
        "pools": {"default": ["smollm2-135m"]},
        "replicas": 1,
        "nats": "nats://127.0.0.1:1",
        "gateway": "http://127.0.0.1:1",
    }
    (state / "site.json").write_text(json.dumps(site))
    with_secret = ("--passphrase-file", str(secret))
    first.lacre("state", "backup", str(file), "--state", str(state), "--no-fabric", *with_secret)
    second.lacre("state", "restore", str(file), "--state", str(back), *with_secret)
    shown = [
        first.lacre("keys", "list", "--json", "--state", str(state)),
        second.lacre("keys", "list", "--json", "--state", str(back)),
    ]
    assert shown[0] == shown[1] and json.loads(shown[0])
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (state, back)
    ]
    assert {**files[0], **files[1]} == files[0], "nothing differs, and nothing is there that was not"


def test_a_commit_that_this_clone_lacks(tmp_path: Path) -> None:
    """A shallow clone: the failure says what to do, and leaves nothing half done."""
    from parts import versions  # noqa: PLC0415

    with pytest.raises(AssertionError, match="git fetch --unshallow"):
        versions.extract(versions.ROOT, "0" * 40, tmp_path / "cache" / "sources")
    assert not (tmp_path / "cache").exists()


def test_another_tree_than_the_one_named(old: Version) -> None:
    """The child itself refuses to run with modules of another tree."""
    wrong = Version("wrong", old.sources.parent, old.python)
    with pytest.raises(AssertionError, match="lacre is that of"):
        wrong.lacre("--version")
