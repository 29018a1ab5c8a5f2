"""The chat page of `lacre proxy`, met by other pages, other ports and other users of the machine; and its chats on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from hostile.attacks import Verdict, attack
from lacre import SettingsError
from lacre.page.door import HALF, ClosedDoor, PageDoor
from lacre.page.history import ChatHistory
from parts.chat_page import ORIGIN, SCRYPT_N

PASSPHRASE = "four random words here"
ONE, TWO = f"{1:032x}", f"{2:032x}"
OWN = {"host": "127.0.0.1:11435", "origin": ORIGIN, "sec-fetch-site": "same-origin"}


@pytest.fixture
def door() -> PageDoor:
    return PageDoor(ORIGIN)


def entered(door: PageDoor) -> dict[str, str]:
    """What the page sends with a request, once a person is in."""
    cookie = door.exchange(door.link().partition("?key=")[2]).partition(";")[0]
    return {**OWN, "cookie": cookie, HALF: door.claim(Headers({"cookie": cookie}))}


@attack("point another name at the chat page, and read it as that name's own (DNS rebinding)", "machine",
        "only the address of the page's link is accepted as `Host`", ClosedDoor)  # fmt: skip
def test_rebound(verdict: Verdict, door: PageDoor) -> None:
    door.check_origin(Headers(OWN), "GET")
    with verdict.refused():
        door.check_origin(Headers({"host": "evil.example:11435"}), "GET")


@attack("let a person's browser ask the chat page from another page", "machine",
        "a request names the page's own origin, and comes from it", ClosedDoor,
        cases=[{"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:8080"}, {"origin": "null"}])  # fmt: skip
def test_another_page(verdict: Verdict, door: PageDoor, case: dict[str, str]) -> None:
    with verdict.refused():
        door.check_origin(Headers({**OWN, **case}), "POST")


@attack("send a change to the chat page by a request without an origin, as old forms do", "machine",
        "a change has an origin", ClosedDoor)  # fmt: skip
def test_without_an_origin(verdict: Verdict, door: PageDoor) -> None:
    with verdict.refused():
        door.check_origin(Headers({"host": OWN["host"]}), "POST")


@attack("serve another port of loopback, where browsers send the chat page's cookie, and use it", "machine",
        "each request also has a secret of the page's own storage, which leaves the proxy once", ClosedDoor)  # fmt: skip
def test_the_cookie_alone(verdict: Verdict, door: PageDoor) -> None:
    stolen = {"cookie": entered(door)["cookie"]}
    with pytest.raises(ClosedDoor):
        door.check_session(Headers({**OWN, **stolen, HALF: "guessed"}))
    with verdict.refused():
        door.claim(Headers(stolen))


@attack("use the link of the chat page again, as the browser's history has it", "machine", "a link works once", ClosedDoor)
def test_a_used_link(verdict: Verdict, door: PageDoor) -> None:
    key = door.link().partition("?key=")[2]
    door.exchange(key)
    with verdict.refused():
        door.exchange(key)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    path.write_bytes(path.with_name(f"{TWO}.chat").read_bytes())


@attack("change an encrypted chat on disk, or put another one in its place", "machine",
        "a chat is authenticated, and bound to its name", SettingsError,
        cases=[flip, swap], ids=["change", "swap"])  # fmt: skip
def test_a_chat_on_disk(verdict: Verdict, tmp_path: Path, case: Callable[[Path], Any]) -> None:
    history = ChatHistory(tmp_path, None, SCRYPT_N)
    history.turn_on("passphrase", PASSPHRASE)
    for name in (ONE, TWO):
        history.save(name, b"{}")
    path = tmp_path / f"{ONE}.chat"
    case(path)
    with verdict.refused():
        history._decrypted(path, ONE)
