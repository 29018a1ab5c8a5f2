"""`lacre admin open` as it is typed, against a gateway's own admin API."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from asyncio.subprocess import PIPE
from html import escape
from pathlib import Path

from parts.commands import run_lacre_bytes
from parts.console_browser import SETTINGS, URL, Desk
from parts.link_browser import LinkBrowser
from parts.stage import Stage
from parts.up import LACRE

from .conftest import PutUp, served


async def typed(stage: Stage, folder: Path, scope: str = "lacre:admin") -> subprocess.CompletedProcess[bytes]:
    token = folder / "token"
    token.write_text(stage.issuer.token(scope=scope, sub="root"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    async with served(stage.admin) as (_, port):
        arguments = ("admin", "open", "--admin", f"http://127.0.0.1:{port}", "--token-file", str(token))
        return await asyncio.to_thread(run_lacre_bytes, *arguments, env=clean)


async def test_a_link_that_works(put_up: PutUp, tmp_path: Path) -> None:
    desk = Desk(await put_up(settings=SETTINGS))
    done = await typed(desk.stage, tmp_path)
    assert done.returncode == 0, done.stderr
    link = done.stdout.decode().strip()
    assert link.startswith(f"{URL}/console/open?code=")
    assert "root of acme" in (await desk.person().get(link.removeprefix(URL))).text
    assert link.rpartition("=")[2] not in desk.stage.log.getvalue()


async def test_a_token_that_others_can_read(put_up: PutUp, tmp_path: Path) -> None:
    stage = (Desk(await put_up(settings=SETTINGS))).stage
    (tmp_path / "token").touch(mode=0o644)
    done = await typed(stage, tmp_path)
    assert done.returncode == 0 and f"run `chmod 600 {tmp_path}/token`".encode() in done.stderr
    (tmp_path / "token").chmod(0o600)
    assert (await typed(stage, tmp_path)).stderr == b""


async def test_the_browser_gets_the_link_in_a_private_file(put_up: PutUp, tmp_path: Path) -> None:
    """Ctrl-C ends the wait for the browser, and the file goes."""
    desk, browser = Desk(await put_up(settings=SETTINGS)), LinkBrowser(tmp_path)
    token, state = tmp_path / "token", tmp_path / "lacre"
    token.write_text(desk.stage.issuer.token(scope="lacre:admin", sub="root"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    async with served(desk.stage.admin) as (_, port):
        command = [*LACRE, "admin", "open", "--browser", "--admin", f"http://127.0.0.1:{port}", "--token-file", str(token)]
        process = await asyncio.create_subprocess_exec(
            *command, env=clean | browser.env() | {"XDG_STATE_HOME": str(tmp_path)}, stdout=PIPE, stderr=PIPE
        )
        try:
            call = await asyncio.to_thread(browser.called)
        finally:
            process.send_signal(signal.SIGINT)
            said, complaint = await process.communicate()
    link = said.decode().strip()
    assert process.returncode == 0, complaint
    assert link.startswith(f"{URL}/console/open?code=") and escape(link) in call.page and call.mode == "0o100600"
    assert link.partition("=")[2] not in call.arguments and "open-console" in call.arguments
    assert not list(state.iterdir())


async def test_who_may_not(put_up: PutUp, tmp_path: Path) -> None:
    desk = Desk(await put_up(settings=SETTINGS))
    refused = await typed(desk.stage, tmp_path, "lacre:http")
    assert refused.returncode == 3
    assert b"console/open" not in refused.stdout


async def test_a_gateway_without_console(put_up: PutUp, tmp_path: Path) -> None:
    refused = await typed(await put_up(), tmp_path)
    assert refused.returncode == 1
    assert b"add a table [console]" in refused.stderr
