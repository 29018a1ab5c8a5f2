"""`lacre top`: as it is typed, and what it draws."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lacre_gateway.admin.reports import StatusReport
from lacre_gateway.console.reports import MinuteReport, WorkerReport
from lacre_gateway.top.screen import Look, bar, drawn, spark
from parts.commands import run_lacre_bytes
from parts.console_browser import Desk
from parts.screen import TMUX, Screen
from parts.waiting import until

from ..conftest import PutUp, served

NOW = 1_790_000_000.0
POOL = {"workers": 2, "busy": 3, "free": 1, "queued": 7, "demand": 10}
STATUS: dict[str, Any] = {
    "gateway": "g1", "version": "1.2", "missing": {}, "draining": False, "seconds": 7300.0, "requests": 5, "streams": 2,
    "pools": {"default": {"lacre": POOL}}, "audit_entries": 99,
    "rules": {"policy_set": "00", "since": 1.0, "reloads": 0, "refusals": 0},
}  # fmt: skip
WORKER: dict[str, Any] = {
    "pool": "default", "region": "lacre", "node": "n1", "models": ["tiny"], "draining": False, "busy": 3, "free": 1,
    "prompt_tokens": 200, "cached_tokens": 50, "generated_tokens": 10, "tokens_per_second": 41.4,
}  # fmt: skip


def look(status: dict[str, Any] | None = None, **members: Any) -> Look:
    return Look(StatusReport.model_validate(STATUS | (status or {})), **members)


def workers(*changes: dict[str, Any]) -> list[WorkerReport]:
    return [WorkerReport.model_validate(WORKER | each) for each in changes]


def minute(at: float, **members: Any) -> MinuteReport:
    names = ("answered", "refused", "failed", "prompt_tokens", "cached_tokens", "completion_tokens", "queued", "busy", "slots",
             "workers")  # fmt: skip
    counts: dict[str, Any] = dict.fromkeys(names, 0)
    return MinuteReport.model_validate({"at": int(at // 60) * 60, "half_ms": None, "most_ms": None, **counts, **members})


def text(seen: Look, width: int = 120, height: int = 40) -> str:
    console = Console(width=width, no_color=True, force_terminal=False, highlight=False)
    with console.capture() as said:
        console.print(drawn(seen, NOW, width, height))
    return said.get()


def test_what_is_there() -> None:
    minutes = [minute(NOW - 120, answered=10, most_ms=250.0, completion_tokens=600), minute(NOW - 60, answered=5, failed=1)]
    said = text(look(workers=workers({}), minutes=minutes))
    assert "lacre g1 1.2 · ready · 5 requests, 2 streams · up 2 h · 99 entries" in said
    (pool,) = [line.split() for line in said.splitlines() if line.startswith("default")]
    assert pool == ["default", "lacre", "2", "3", "4", "━━━━━━━━━───", "75%", "7"]
    (worker,) = [line.split() for line in said.splitlines() if line.startswith("n1")]
    assert worker == ["n1", "default", "tiny", "3", "4", "41", "25%"]
    asked = next(line for line in said.splitlines() if line.startswith("requests/min"))
    assert asked.split() == ["requests/min", "█▅", "6"]
    assert next(line for line in said.splitlines() if line.startswith("first byte")).endswith("250 ms")
    assert "!" not in said


@pytest.mark.parametrize(
    ("status", "fault", "told"),
    [
        ({"missing": {"keys": "nobody"}}, None, ["not ready", "! keys: nobody"]),
        ({"draining": True}, None, ["draining"]),
        ({"pools": {"legal": {"lacre": POOL | {"workers": 0}}}}, None, ["! pool legal: no live worker serves it"]),
        ({"pools": {"legal": {}}}, None, ["! pool legal"]),
        ({"settings": {"fault": "admin.port"}}, None, ["! settings: the file on the disk was refused: admin.port"]),
        ({}, "no answer", ["! no answer"]),
        ({"pools": {"default": {"lacre": POOL | {"queued": None}}}}, None, ["75% ?"]),
    ],
)  # fmt: skip
def test_what_someone_should_act_on(status: dict[str, Any], fault: str | None, told: list[str]) -> None:
    said = " ".join(text(look(status, fault=fault)).split())
    for each in told:
        assert each in said


def test_a_small_terminal_shows_the_busiest() -> None:
    many = workers(*({"node": f"w{number}", "busy": number % 5} for number in range(30)))
    said = text(look(workers=many), width=60, height=23)
    shown = [line for line in said.splitlines() if line.startswith("w") and not line.startswith("worker")]
    assert len(shown) == 8 and all("w" + str(number) in said for number in (4, 9, 14))
    assert "and 22 more" in said
    assert max(map(len, said.splitlines())) <= 60
    assert "models" not in said and "tokens/s  cached" in said and "…" not in said


def test_names_of_others_control_nothing() -> None:
    hostile = "\x1b[2J[red]x[/red]\n" + "w" * 100
    said = text(
        look({"gateway": hostile, "missing": {hostile: hostile}}, workers=workers({"node": hostile, "models": [hostile]}))
    )
    assert "\x1b" not in said and "[red]x[/red]" in said
    assert all("w" * 41 not in line for line in said.splitlines() if not line.startswith(("!", "w")))


def test_bars() -> None:
    assert spark([None, 0.0, 0.0]) == " ▁▁"
    assert spark([1.0, 4.0, 8.0, None]) == "▁▄█ "
    assert spark([]) == ""
    assert [bar(*each).plain for each in ((0, 0), (0, 4), (4, 4))] == [
        "──────────── 0%",
        "──────────── 0%",
        "━━━━━━━━━━━━ 100%",
    ]


async def typed(app: Any, folder: Path, token: str, *more: str) -> subprocess.CompletedProcess[bytes]:
    (folder / "token").write_text(token)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    async with served(app) as (_, port):
        address = ("--admin", f"http://127.0.0.1:{port}", "--token-file", str(folder / "token"))
        return await asyncio.to_thread(run_lacre_bytes, "top", *address, *more, env=clean)


async def test_as_it_is_typed(desk: Desk, tmp_path: Path) -> None:
    """In a pipe it prints one look."""
    done = await typed(desk.stage.admin, tmp_path, desk.admin())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("lacre g1 ")
    looked = [(entry["action"], entry["decision"], entry["subject"]) for entry in desk.stage.entries("admin")]
    assert looked == [("admin:usage", "allow", "root")] * 3, "state, workers and minutes: each look is recorded"
    assert b"requests/min" in done.stdout
    told = json.loads((await typed(desk.stage.admin, tmp_path, desk.admin(), "--json")).stdout)
    assert told["status"]["gateway"] and told["workers"] is not None and told["minutes"] is not None


async def test_without_a_console_and_without_a_right(put_up: PutUp, tmp_path: Path) -> None:
    stage = await put_up()
    plain = await typed(stage.admin, tmp_path, stage.issuer.token(scope="lacre:admin", sub="root"))
    assert plain.returncode == 0 and b"[console]" in plain.stdout
    refused = await typed(stage.admin, tmp_path, stage.issuer.token(scope="lacre:http", sub="root"))
    assert refused.returncode == 3 and b"ready" not in refused.stdout


@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
async def test_at_a_terminal(desk: Desk, tmp_path: Path) -> None:
    """It goes on after a pause of the gateway, and Ctrl-C leaves the terminal as it was."""
    (tmp_path / "token").write_text(desk.admin())
    screen, clean = Screen(tmp_path), {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    try:
        async with served(desk.stage.admin) as (_, port):
            address = ("--admin", f"http://127.0.0.1:{port}", "--token-file", str(tmp_path / "token"))
            await asyncio.to_thread(screen.start, clean, "top", "--every", "1", *address)
            first = await asyncio.to_thread(screen.wait_for, r"lacre g1 .* · ready · .* (\d+) entries")
            assert "requests/min" in first
            before = int(re.findall(r"(\d+) entries", first)[0])
            await until(lambda: int(re.findall(r"(\d+) entries", screen.tmux("capture-pane", "-p"))[0]) > before, 30)
        await asyncio.to_thread(screen.wait_for, "! no answer since the last look")
        await asyncio.to_thread(screen.keys, "C-c")
        shown = await asyncio.to_thread(screen.wait_for, "ended with 0")
        assert "lacre g1" not in shown and "Traceback" not in shown
    finally:
        screen.tmux("kill-server", check=False)
