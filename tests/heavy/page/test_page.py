"""The chat page in Chromium: a person with a real model behind `lacre up`, and strangers with hostile answers and pages.

Pictures of each view are written to build/screens/page, for people to look at.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest

from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.live import Gateway, beside, settings
from parts.npm import install
from parts.relay import Relay
from parts.up import LACRE, Up, environment, ticks

HERE = Path(__file__).resolve().parent
SCREENS = HERE.parents[2] / "build" / "screens" / "page"
BUILT = {
    "p", "code", "pre", "div", "span", "button", "svg", "path", "a", "small", "table", "thead", "tbody", "tr", "th", "td", "br",
}  # fmt: skip


@contextmanager
def proxy(env: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """A `lacre proxy --open`, and what it told."""
    command = [*LACRE, "proxy", "--port", "0", "--json", "--open", "--no-browser"]
    process = subprocess.Popen(command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line), process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def driven(script: str, acts: Mapping[str, Callable[[], object]], work: Path, **variables: str) -> dict[str, Any]:
    """What a script told. acts: what it asks for, and what that answers."""
    env = {"PATH": os.environ["PATH"], "HOME": str(work), "CHROMIUM": str(shutil.which("chromium")), "WORK": str(work)}
    with (work / "node.err").open("w+") as errors:
        node = subprocess.Popen(
            ["node", script], cwd=HERE, env=env | {"SCREENS": str(SCREENS)} | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        with node as process:
            assert process.stdin is not None and process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if "told" in said:
                    process.wait(60)
                    told: dict[str, Any] = said["told"]
                    return told
                process.stdin.write(json.dumps(acts[said["do"]]()) + "\n")
                process.stdin.flush()
        raise AssertionError((work / "node.err").read_text())


def busiest(up: Up) -> int:
    """The worker that computes now."""
    before = {pid: ticks(pid) for pid in up.workers()}
    time.sleep(0.4)
    return max(before, key=lambda pid: ticks(pid) - before[pid])


@pytest.mark.timeout(900)
def test_a_person(tmp_path: Path) -> None:
    install(HERE)
    with Up.start(tmp_path / "state", "--workers", "2") as up, ExitStack() as later:
        env = environment(up.state) | {"LACRE_URL": up.url, "LACRE_TOKEN": up.token}
        told, first = later.enter_context(proxy(env))
        chats = tmp_path / "xdg" / "lacre" / "chats"

        def on_disk() -> list[str]:
            files = sorted(chats.iterdir()) if chats.is_dir() else []
            assert not [file for file in files if b"lighthouse" in file.read_bytes()]
            return ["key" if file.name == "key.json" else file.suffix for file in files]

        def kill() -> None:
            os.kill(busiest(up), 9)

        def stop() -> None:
            first.terminate()
            first.wait(30)

        def another() -> dict[str, Any]:
            started, _ = later.enter_context(proxy(env))
            return started

        acts = {"kill": kill, "look at the history": on_disk, "stop the proxy": stop, "start another proxy": another}
        seen = driven("person.mjs", acts, tmp_path, LINK=told["page"], ORIGIN=told["origin"])

    assert seen["address"] == told["origin"] + "/" and seen["lock"].startswith("Sealed · manifest v")
    assert seen["first"]["text"] and "tokens" in seen["first"]["figures"]
    assert seen["spoken"].startswith("Answer: ")
    held = {what.split("\n")[0].strip("✓– ").removesuffix(" (verified)"): value for ok, what, value in seen["proof"] if ok}
    wanted = {"Root key", "Signer", "Manifest", "Sealed to", "Key", "Receipt", "Weights", "Audit log"}
    assert wanted == held.keys() and len(seen["proof"]) == len(wanted) + 2, seen["proof"]
    assert "Every check held" in seen["summary"] and seen["closed"] == 0
    assert seen["stopped"] == {"kept": True, "says": "You stopped this answer here."}
    assert seen["branches"] == ["2 / 2"] and seen["again"] == ["2 / 2", "2 / 2"]
    assert len(seen["back"]) == 2
    assert seen["reloaded"] == {"same": True, "draft": "not sent yet"}
    assert any("(this window)" in title for title in seen["windows"]) and "Another window changed" in seen["trouble"]
    assert seen["mine"] == "from the first window"
    seam = seen["seam"]
    assert seam["marks"] == 1 and "at the same token" in seam["says"][0] and not seam["error"], seam
    assert seen["parts"] == 1
    assert "neither text in UTF-8" in seen["refusedFile"] and seen["file"] == "<img src=x onerror=alert(1)>.txt"
    assert seen["found"] >= 2 and seen["exported"] >= 3 and seen["imported"] == "not checked here"
    assert seen["history"][-1] == "key" and seen["history"].count(".chat") >= 4
    assert seen["overflow"] <= 0, "nothing is wider than a phone"
    assert "typed while the proxy is away" in seen["away"]["question"] and "does not answer" in seen["away"]["says"]
    assert "passphrase does not open" in seen["wrong"] and seen["restored"] >= 4
    assert seen["forgotten"] == {"chats": 0, "disk": []}
    assert seen["foreign"] == []
    wanted = ("ERR_CONNECTION_REFUSED", "status of 500")  # the proxy that was stopped, and the wrong passphrase
    assert not [error for error in seen["errors"] if not any(each in error for each in wanted)], seen["errors"]
    assert len(seen["axe"]) >= 10 and not any(seen["axe"].values()), seen["axe"]


class Other(SimpleHTTPRequestHandler):
    """Another server on this machine. sent: the cookies that browsers sent to it."""

    sent: ClassVar[list[str]] = []

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.sent.append(self.headers.get("cookie", ""))
        super().do_GET()


@pytest.fixture
def other_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Other, directory=str(HERE)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.timeout(900)
def test_strangers(tmp_path: Path, other_port: int) -> None:
    install(HERE)
    engine = EchoEngine(name="tiny", n_ctx=4096)
    with beside(Gateway(Relay(create_app([engine])))) as gateway, proxy(settings(gateway, tmp_path)) as (told, _):
        origin = told["origin"]

        def stolen() -> list[Any]:
            """Another port of this address gets the cookie, and can do nothing with it."""
            [cookie] = {each for each in Other.sent if "lacre-page-" in each}
            thief = {"cookie": cookie, "origin": origin}
            with httpx2.Client(base_url=origin, trust_env=False) as http:
                tried = [http.get("/page/api/chats", headers=thief), http.post("/page/api/claim", headers=thief, json={})]
            return [each.json()["error"]["code"] for each in tried]

        seen = driven(
            "stranger.mjs",
            {"use what the other port was sent": stolen},
            tmp_path,
            LINK=told["page"],
            ORIGIN=origin,
            STRANGER=f"http://127.0.0.1:{other_port}",
        )
    engine.close()
    for struck in seen["struck"]:
        assert set(struck["built"]) <= BUILT and not struck["error"], struck
        for href, rel, target in struck["links"]:
            assert href.startswith("https://") and rel == "noopener noreferrer" and target == "_blank"
    assert seen["struckBy"] is None and seen["visible"]
    assert seen["picture"]["drawn"] == 1 and "takes no images" in seen["picture"]["says"][1]
    assert sum("as the message and code say" in line for line in seen["picture"]["says"]) == 1, seen["picture"]
    assert seen["policy"] == {"html": "TypeError", "struck": None}
    for name in ("port", "evil"):
        found = seen[name]
        assert found["read"] == found["post"] == "TypeError", found
        assert found["blind"] == "TypeError" or found["blind"][1] == 0, found
        assert found["script"] == "refused" and found["framed"] == "closed", found
        assert found["popup"] in ("cut off", "SecurityError"), found
    assert seen["stolen"] == ["no_half", "claimed"]
    assert seen["rebound"][:2] == [421, "Another address"] and seen["rebound"][2] == "TypeError"
    assert seen["nobody"] == [401, "This page is closed"] and seen["used"] == [410, "This link no longer works"]
    assert seen["leaks"] == 0 and seen["foreign"] == []
    assert seen["mail"] == origin + "/"
    assert not any(seen["axe"].values()), seen["axe"]
