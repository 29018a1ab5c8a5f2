"""`lacre proxy --open` as a process of its own: its link, its browser, and its API beside the page."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre_backend.api.app import create_app
from parts.chat_page import API
from parts.echo_engine import EchoEngine
from parts.link_browser import LinkBrowser
from parts.live import Gateway, beside, settings
from parts.relay import Relay
from parts.up import LACRE

PRICES = '[prices."*"]\nprompt = "1"\ncached = "1"\ncompletion = "2"\n'


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    engine = EchoEngine(name="tiny", n_ctx=512)
    with beside(Gateway(Relay(create_app([engine])))) as live:
        yield live
    engine.close()


@contextmanager
def running(gateway: Gateway, home: Path, *options: str, **env: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """What it told, and the file of its log."""
    log = home / "log"
    with log.open("wb") as messages:
        process = subprocess.Popen(
            [*LACRE, "proxy", "--port", "0", "--json", "--open", *options],
            env=settings(gateway, home) | env, stdout=subprocess.PIPE, stderr=messages, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield json.loads(line), log
        finally:
            process.terminate()
            process.communicate(timeout=30)


def test_from_link_to_answer(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    with running(gateway, tmp_path, "--no-browser", "--prices", str(tmp_path / "prices.toml")) as (told, log):
        link = httpx2.URL(told["page"])
        origin = f"http://127.0.0.1:{link.port}"
        assert told["origin"] == origin and str(link).startswith(f"{origin}/?key=")
        with httpx2.Client(base_url=origin, trust_env=False, timeout=60) as http:
            assert http.get("/").status_code == 401
            opened = http.get(link)
            assert (opened.status_code, opened.headers["location"]) == (303, "/")
            cookie = {"cookie": opened.headers["set-cookie"].partition(";")[0], "origin": origin}
            assert "/page/main.js" in http.get("/", headers=cookie).text
            half = http.post(f"{API}claim", headers=cookie, json={}).json()["half"]
            inside = {**cookie, "lacre-page": half}
            state = http.get(f"{API}state", headers=inside).json()
            assert state["models"] == ["tiny"] and state["priced"] and state["verification"]["manifest"]["version"] == 1
            assert state["history"]["folder"] == str(tmp_path / "lacre" / "chats")
            asked = {"messages": [{"role": "user", "content": "the sea"}], "params": {"max_tokens": 40}}
            end = json.loads(http.post(f"{API}ask", headers=inside, json=asked).text.splitlines()[-1])
            assert end["t"] == "end" and float(end["cost"]) > 0
            # The API keeps its own rules: the page's session is no key to it, and its key is none to the page.
            assert http.get("/v1/models", headers={"cookie": cookie["cookie"], "lacre-page": half}).status_code == 401
            key = {"authorization": f"Bearer {told['api_key']}"}
            assert http.get("/v1/models", headers=key).status_code == 200
            assert http.get("/v1/models", headers={**key, "origin": origin}).status_code == 403
            assert http.get(f"{API}state", headers=key).status_code == 401
            assert http.get("/chat/completions", headers=key).status_code == 404
        secrets = (link.params["key"], half, cookie["cookie"].partition("=")[2], "the sea")
        assert not [secret for secret in secrets if secret in log.read_text()]
    assert not (tmp_path / "lacre" / "chats").exists()


def test_without_open_there_is_no_page(gateway: Gateway, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*LACRE, "proxy", "--port", "0", "--json"], env=settings(gateway, tmp_path), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert "page" not in told
        key = {"authorization": f"Bearer {told['api_key']}"}
        for path in ("/", "/page/main.js", f"{API}state"):
            assert httpx2.get(told["origin"] + path, headers=key, trust_env=False).json()["error"]["code"] == "unknown_url"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_browser_gets_the_link_in_a_private_file(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user of the machine can read a program's arguments: the key is in none."""
    browser = LinkBrowser(tmp_path)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)  # it would say that no person sits here
    with running(gateway, tmp_path, **browser.env()) as (told, _):
        call = browser.called()
        key = httpx2.URL(told["page"]).params["key"]
        assert key not in call.arguments and "open-lacre-page-" in call.arguments and call.mode == "0o100600"
        assert f"url={told['page']}" in call.page and 'name="referrer" content="no-referrer"' in call.page
        [file] = (tmp_path / "lacre").glob("open-*")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert httpx2.get(told["page"], trust_env=False).status_code == 303
        assert not file.exists(), "a used link is not kept"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0", "--allow-remote"], "only served on loopback"),
        (["--prices", "/nonexistent"], "cannot read"),
        (["--prices", "empty.toml"], "no table `prices`"),
        (["--prices", "wrong.toml"], "is not TOML"),
        (["--prices", "odd.toml"], "must have prompt, cached and completion"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(gateway: Gateway, tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "wrong.toml").write_text("[")
    (tmp_path / "odd.toml").write_text('[prices."*"]\nprompt = "1"\n')
    command = [*LACRE, "proxy", "--port", "0", "--open", "--no-browser", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=settings(gateway, tmp_path))
    assert done.returncode == 1 and says in done.stderr and "?key=" not in done.stdout
