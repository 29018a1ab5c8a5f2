"""The page's chats: in memory, and encrypted on disk; what was changed there, and what is too much."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keyring.errors import KeyringError
from keyrings.alt.file import PlaintextKeyring

import lacre
from lacre.page import chats as room
from lacre.page.chats import Chats
from lacre.page.history import MAX_CHAT, ChatHistory
from lacre.transport.login import OsKeyring
from lacre_backend.api.app import create_app
from parts.bent import flipped
from parts.chat_page import SCRYPT_N, Visitor, new_chat, page_of
from parts.echo_engine import EchoEngine
from parts.relay import Relay

PASSPHRASE = "four random words here"
CANARY = "xylophone-canary"
ONE, TWO = f"{1:032x}", f"{2:032x}"


@pytest.fixture
async def inside(tmp_path: Path) -> AsyncIterator[Visitor]:
    async with page_of(Relay(create_app([EchoEngine(name="tiny")])), tmp_path) as visitor:
        await visitor.enter()
        yield visitor


def keyring_in(folder: Path) -> OsKeyring:
    """The package's own keyring of a file."""
    vault = PlaintextKeyring()
    vault.file_path = str(folder / "keyring.cfg")
    return OsKeyring(vault, KeyringError)


def history(folder: Path, keyring: OsKeyring | None = None) -> ChatHistory:
    return ChatHistory(folder / "chats", keyring, SCRYPT_N)


def files_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


def encoded(number: int = 1, **members: Any) -> bytes:
    return json.dumps(new_chat(number, **members)).encode()


def begun(folder: Path) -> Chats:
    """Chats with one on disk, under a passphrase."""
    chats = Chats(history(folder))
    chats.history.turn_on("passphrase", PASSPHRASE)
    chats.keep()
    chats.write(ONE, encoded(text=CANARY), 0)
    return chats


def again(folder: Path) -> Chats:
    """As the next proxy opens them."""
    chats = Chats(history(folder))
    chats.history.open(PASSPHRASE)
    chats.keep()
    return chats


class TestInMemory:
    async def test_a_chat(self, inside: Visitor, tmp_path: Path) -> None:
        assert (await inside.ask("PUT", f"chats/{ONE}", new_chat(1, CANARY), lacre_revision="0")).json() == {"revision": 1}
        assert (await inside.ask("GET", f"chats/{ONE}")).json() == new_chat(1, CANARY)
        await inside.ask("PUT", f"chats/{TWO}", new_chat(2))
        listed = (await inside.ask("GET", "chats")).json()
        assert [head["id"] for head in listed["chats"]] == [TWO, ONE]
        assert listed["history"] | {"folder": ""} == {
            "state": "off", "kind": None, "keyring": False, "folder": "", "unreadable": [],
        }  # fmt: skip
        assert (await inside.ask("DELETE", f"chats/{TWO}")).json() == {"deleted": True}
        assert (await inside.ask("DELETE", f"chats/{TWO}")).json() == {"deleted": False}
        assert inside.page.chats.history.folder == tmp_path / "chats" and files_in(tmp_path) == []

    async def test_two_windows(self, inside: Visitor) -> None:
        path = f"chats/{ONE}"
        await inside.ask("PUT", path, new_chat(), lacre_revision="0")
        assert (await inside.ask("PUT", path, new_chat(text="mine"), lacre_revision="1")).json() == {"revision": 2}
        stale = await inside.ask("PUT", path, new_chat(text="other"), lacre_revision="1")
        assert (stale.status_code, stale.json()["error"]["code"]) == (409, "stale")
        assert "mine" in (await inside.ask("GET", path)).text

    async def test_a_revision_of_many_digits(self, inside: Visitor) -> None:
        await inside.ask("PUT", f"chats/{ONE}", new_chat(), lacre_revision="0")
        told = await inside.ask("PUT", f"chats/{ONE}", new_chat(text="other"), lacre_revision="9" * 5000)
        assert (told.status_code, told.json()["error"]["code"]) == (409, "stale")

    def test_a_search_beside_changes(self, tmp_path: Path) -> None:
        chats = Chats(history(tmp_path))
        names = [f"{number:032x}" for number in range(60)]
        for number, name in enumerate(names):
            chats.write(name, encoded(number, text="x" * 5_000), 0)

        def search() -> list[Any]:
            while chats.heads():
                assert chats.find("nowhere") == []
            return chats.heads()

        with ThreadPoolExecutor(2) as pool:
            searches = [pool.submit(search) for _ in range(2)]
            for name in names:
                time.sleep(0.002)  # so that searches are under way
                chats.delete(name)
            assert [each.result() for each in searches] == [[], []]

    def test_a_time_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(lacre.UsageError, match="a title and a time"):
            Chats(history(tmp_path)).write(ONE, encoded(updated=0).replace(b'"updated": 0', b'"updated": 1e999'), 0)

    async def test_search(self, inside: Visitor) -> None:
        await inside.ask("PUT", f"chats/{ONE}", new_chat(1, f"before {CANARY} after"))
        await inside.ask("PUT", f"chats/{TWO}", new_chat(2, title="<b>About XYLOPHONES</b>"))
        found = (await inside.ask("POST", "search", {"words": "Xylophone"})).json()["chats"]
        assert [(head["id"], head["around"]) for head in found] == [
            (TWO, "<b>About XYLOPHONES</b>"),
            (ONE, f"before {CANARY} after"),
        ]
        assert (await inside.ask("POST", "search", {"words": "  "})).json() == {"chats": []}
        assert (await inside.ask("POST", "search", {"words": 1})).json() == {"chats": []}

    @pytest.mark.parametrize(
        ("name", "body"),
        [
            ("x", new_chat()), ("..%2f..%2fx", new_chat()), (ONE.upper().replace("0", "A"), new_chat()), (TWO, new_chat(1)),
            (ONE, {}), (ONE, new_chat(title=1)), (ONE, new_chat(updated="now")), (ONE, new_chat(updated=True)),
            (ONE, new_chat(updated=10**400)), (ONE, []), (ONE, None),
        ],
        ids=str,
    )  # fmt: skip
    async def test_what_is_no_chat(self, inside: Visitor, name: str, body: Any) -> None:
        told = await inside.ask("PUT", f"chats/{name}", body)
        assert 400 <= told.status_code < 503 and told.json()["error"]["message"]
        assert (await inside.ask("GET", "chats")).json()["chats"] == []

    def test_bounds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        chats = Chats(history(tmp_path))
        with pytest.raises(lacre.errors.MessageTooLarge, match="a chat may hold"):
            chats.write(ONE, encoded(text="x" * MAX_CHAT), 0)
        monkeypatch.setattr(room, "MAX_CHATS", 1)
        chats.write(ONE, encoded(), 0)
        with pytest.raises(lacre.errors.MessageTooLarge, match="export and delete"):
            chats.write(TWO, encoded(2), 0)
        monkeypatch.setattr(room, "MAX_ALL", len(encoded(text="the sea")) + 10)
        chats.write(ONE, encoded(), 1)
        with pytest.raises(lacre.errors.MessageTooLarge, match="all chats together"):
            chats.write(ONE, encoded(text="x" * 100), 2)
        assert chats.read(ONE) == encoded()


class TestOnDisk:
    def test_it_is_encrypted_and_comes_back(self, tmp_path: Path) -> None:
        begun(tmp_path)
        found = sorted((tmp_path / "chats").iterdir())
        assert [path.name for path in found] == [f"{ONE}.chat", "key.json"]
        assert stat.S_IMODE((tmp_path / "chats").stat().st_mode) == 0o700
        for path in found:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert CANARY.encode() not in path.read_bytes() and PASSPHRASE.encode() not in path.read_bytes()
        chats = again(tmp_path)
        assert chats.read(ONE) == encoded(text=CANARY) and chats.unreadable == ()
        chats.delete(ONE)
        assert [path.name for path in (tmp_path / "chats").iterdir()] == ["key.json"]

    def test_the_same_chat_never_looks_the_same(self, tmp_path: Path) -> None:
        chats = begun(tmp_path)
        path = tmp_path / "chats" / f"{ONE}.chat"
        first = path.read_bytes()
        chats.write(ONE, encoded(text=CANARY), 1)
        assert path.read_bytes()[:13] == first[:13] and path.read_bytes()[13:] != first[13:]

    def test_turning_it_on_keeps_what_was_in_memory(self, tmp_path: Path) -> None:
        chats = Chats(history(tmp_path))
        chats.write(ONE, encoded(text=CANARY), 0)
        assert not (tmp_path / "chats").exists()
        chats.history.turn_on("passphrase", PASSPHRASE)
        chats.keep()
        assert again(tmp_path).read(ONE) == encoded(text=CANARY)
        with pytest.raises(lacre.SettingsError, match="already"):
            chats.history.turn_on("passphrase", PASSPHRASE)

    def test_opening_it_keeps_the_newer_of_two(self, tmp_path: Path) -> None:
        begun(tmp_path)
        chats = Chats(history(tmp_path))
        chats.write(ONE, json.dumps({**new_chat(text="newer"), "updated": 9.0}).encode(), 0)
        chats.write(TWO, encoded(2), 0)
        assert chats.history.state == "locked"
        chats.history.open(PASSPHRASE)
        chats.keep()
        assert b"newer" in (again(tmp_path).read(ONE) or b"") and again(tmp_path).read(TWO) == encoded(2)

    def test_a_chat_that_the_disk_does_not_take(self, tmp_path: Path) -> None:
        chats = Chats(history(tmp_path))
        for number, name in enumerate((ONE, TWO), 1):
            chats.write(name, encoded(number), 0)
        chats.history.turn_on("passphrase", PASSPHRASE)
        (tmp_path / "chats" / f"{ONE}.chat").mkdir()
        with pytest.raises(lacre.SettingsError, match="cannot be changed"):
            chats.keep()
        assert [chats.read(name) for name in (ONE, TWO)] == [encoded(1), encoded(2)], "all are in memory"
        assert again(tmp_path).read(TWO) == encoded(2), "and the others on the disk"

    def test_a_key_in_the_keyring(self, tmp_path: Path) -> None:
        keyring = keyring_in(tmp_path)
        chats = Chats(history(tmp_path, keyring))
        chats.history.turn_on("keyring")
        chats.keep()
        chats.write(ONE, encoded(text=CANARY), 0)
        other = history(tmp_path, keyring)
        assert (other.state, other.kind) == ("locked", "keyring")
        other.open()
        assert other.load() == ({ONE: encoded(text=CANARY)}, ())
        for lost in (None, keyring_in(tmp_path / "chats")):
            with pytest.raises(lacre.SettingsError, match="keyring does not have the key"):
                history(tmp_path, lost).open()
        other.forget()
        assert not list((tmp_path / "chats").iterdir())
        assert "chats-" not in (tmp_path / "keyring.cfg").read_text().replace("chats_2d", "chats-")

    def test_a_keyring_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(lacre.SettingsError, match="choose a passphrase"):
            history(tmp_path).turn_on("keyring")
        assert not (tmp_path / "chats").exists()

    @pytest.mark.parametrize("passphrase", ["", "short", "wrong words of it all", PASSPHRASE + " ", "x" * 2000])
    def test_another_passphrase(self, tmp_path: Path, passphrase: str) -> None:
        begun(tmp_path)
        locked = history(tmp_path)
        with pytest.raises(lacre.SettingsError) as refused:
            locked.open(passphrase)
        assert not passphrase or passphrase not in str(refused.value)
        assert locked.state == "locked"

    def test_forget(self, tmp_path: Path) -> None:
        chats = begun(tmp_path)
        (tmp_path / "chats" / "notes.txt").write_text("a person's own")
        chats.forget()
        assert chats.heads() == [] and chats.history.state == "off"
        assert [path.name for path in (tmp_path / "chats").iterdir()] == ["notes.txt"]
        chats.history.turn_on("passphrase", PASSPHRASE)

    def test_a_history_that_nobody_can_open_can_be_deleted(self, tmp_path: Path) -> None:
        begun(tmp_path)
        (tmp_path / "chats" / "key.json").write_text("{}")
        locked = Chats(history(tmp_path))
        locked.forget()
        assert locked.history.state == "off" and not list((tmp_path / "chats").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(MAX_CHAT * 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a flipped bit of the nonce": lambda path: path.write_bytes(flipped(path.read_bytes(), 14)),
    "another version": lambda path: path.write_bytes(flipped(path.read_bytes(), 11)),
    "cut off": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "only a head": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "readable by others": lambda path: path.chmod(0o644),
    "a link": link,
    "a pipe": fifo,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "huge": huge,
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_of_a_chat(self, tmp_path: Path, kind: str) -> None:
        """It is named and not used, and the others open."""
        chats = begun(tmp_path)
        chats.write(TWO, encoded(2), 0)
        DAMAGE[kind](tmp_path / "chats" / f"{ONE}.chat")
        opened = again(tmp_path)
        assert [head["id"] for head in opened.heads()] == [TWO]
        [wrong] = opened.unreadable
        assert wrong.name == f"{ONE}.chat" and wrong.reason

    def test_one_chat_in_place_of_another(self, tmp_path: Path) -> None:
        begun(tmp_path)
        shutil.copy(tmp_path / "chats" / f"{ONE}.chat", tmp_path / "chats" / f"{TWO}.chat")
        assert [wrong.name for wrong in again(tmp_path).unreadable] == [f"{TWO}.chat"]

    def test_a_chat_of_another_history(self, tmp_path: Path) -> None:
        begun(tmp_path / "a")
        begun(tmp_path / "b")
        shutil.copy(tmp_path / "a" / "chats" / f"{ONE}.chat", tmp_path / "b" / "chats" / f"{TWO}.chat")
        assert len(again(tmp_path / "b").unreadable) == 1

    def test_what_is_encrypted_but_no_chat(self, tmp_path: Path) -> None:
        chats = begun(tmp_path)
        chats.history.save(TWO, b"[]")
        assert [wrong.name for wrong in again(tmp_path).unreadable] == [f"{TWO}.chat"]

    @pytest.mark.parametrize("kind", ["readable by others", "a link", "a pipe", "empty", "huge"])
    def test_of_the_key(self, tmp_path: Path, kind: str) -> None:
        begun(tmp_path)
        DAMAGE[kind](tmp_path / "chats" / "key.json")
        with pytest.raises(lacre.LacreError):
            history(tmp_path).open(PASSPHRASE)

    @pytest.mark.parametrize(
        "members",
        [
            {"format": "other"}, {"kind": "none"}, {"kind": ["keyring"]}, {"kind": "keyring"}, {"salt": "x"}, {"salt": None},
            {"wrapped": "AAAA"}, {"n": 2**40}, {"n": 3}, {"n": 0}, {"n": -2}, {"n": True}, {"n": "16"}, {"n": 32},
        ],
        ids=str,
    )  # fmt: skip
    def test_of_the_keys_members(self, tmp_path: Path, members: dict[str, Any]) -> None:
        begun(tmp_path)
        path = tmp_path / "chats" / "key.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | members))
        with pytest.raises(lacre.LacreError):
            history(tmp_path).open(PASSPHRASE)

    async def test_as_the_page_tells_it(self, tmp_path: Path) -> None:
        begun(tmp_path)
        DAMAGE["a flipped bit"](tmp_path / "chats" / f"{ONE}.chat")
        async with page_of(Relay(create_app([EchoEngine(name="tiny")])), tmp_path) as visitor:
            await visitor.enter()
            assert (await visitor.ask("GET", "state")).json()["history"]["state"] == "locked"
            wrong = await visitor.ask("POST", "history", {"kind": "open", "passphrase": "not the right words"})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (500, "settings_error")
            told = (await visitor.ask("POST", "history", {"kind": "open", "passphrase": PASSPHRASE})).json()
            assert told["state"] == "open" and told["unreadable"][0]["name"] == f"{ONE}.chat"
            assert (await visitor.ask("DELETE", "history")).json()["state"] == "off"
            assert (await visitor.ask("POST", "history", {"kind": "x"})).status_code == 400
