"""`lacre budget tenants`, `top-up` and `reset` as they are typed, against a gateway's own admin API."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre.cli.output import say_csv
from lacre.errors import InvalidMessage, RefusedError, SettingsError
from lacre_gateway.admin.calls import MAX_ANSWER, AdminApi, address_of, admin_token
from lacre_gateway.admin.reports import TenantsReport
from lacre_gateway.settings import Admin, GatewaySettings
from parts.commands import run_lacre_bytes
from parts.relay import Stream
from parts.stage import Stage

from .conftest import PutUp, served

PLANS = """
default_plan = "free"
currency = "EUR"
[prices."*"]
prompt = "1"
cached = "1"
completion = "1"
[plans.free.user]
tokens_per_day = 5000
[plans.free.tenant]
money_per_month = "0.10"
[tenants.idle]
plan = "free"
"""
ALICE = ("--tenant", "acme", "--user", "alice", "--plan", "free")
Typed = Callable[..., Coroutine[Any, Any, subprocess.CompletedProcess[bytes]]]


@asynccontextmanager
async def desk(stage: Stage, folder: Path, scope: str = "lacre:admin") -> AsyncIterator[Typed]:
    """An operator's shell beside the gateway."""
    token = folder / "token"
    token.write_text(f"{stage.issuer.token(scope=scope, sub='root')}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    async with served(stage.admin) as (_, port):

        async def typed(*arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
            place = () if "--admin" in arguments else ("--admin", f"http://127.0.0.1:{port}")
            key = () if env else ("--token-file", str(token))
            return await asyncio.to_thread(run_lacre_bytes, "budget", *arguments, *place, *key, env=clean | env)

        yield typed


async def test_a_top_up_and_a_reset(put_up: PutUp, tmp_path: Path) -> None:
    """Both can be run twice. The audit log has who did it."""
    stage = await put_up(plans=PLANS)
    async with stage.fake_worker(), stage.http() as client, desk(stage, tmp_path) as typed:
        assert (await stage.post(client)).status_code == 200
        await stage.trail(1)
        for _ in range(2):
            done = await typed("top-up", "1000", "--limit", "tokens_per_day", *ALICE, "--id", "ticket-7")
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(b"alice of acme on free: tokens_per_day raised by 1000 until ")
            assert done.stdout.endswith(b"(id ticket-7)\n")
        done = await typed("top-up", "0.25", "--limit", "money_per_month", "--tenant", "acme", "--plan", "free", "--json")
        assert (json.loads(done.stdout)["added"], json.loads(done.stdout)["name"]) == (250_000, "acme on free")
        [own] = [each for each in (await me(stage, client)) if each["limit"] == "tokens_per_day"]
        assert (own["ceiling"], own["used"]) == (6000, 19)
        for added in (0, 0):  # the top-up is more than was used
            done = await typed("reset", "--limit", "tokens_per_day", *ALICE, "--json")
            assert json.loads(done.stdout)["added"] == added, done.stderr
    intents = [each["target"] for each in stage.entries("admin")]
    assert intents[:2] == ["user/acme/alice/free/tokens_per_day+1000#ticket-7"] * 2
    assert re.fullmatch(r"tenant-on-plan/acme/free/money_per_month\+250000#[0-9a-f]{16}", intents[2])
    assert re.fullmatch(r"user/acme/alice/free/tokens_per_day#[0-9a-f]{16}", intents[3])
    told = [(each["event"], each["actor"], each["count"]) for each in stage.entries("event") if "budget" in each["event"]]
    assert (
        told
        == [("budget-topped-up", "acme/root", 1000)] * 2
        + [("budget-topped-up", "acme/root", 250_000)]
        + [("budget-reset", "acme/root", 0)] * 2
    )


async def me(stage: Stage, client: httpx2.AsyncClient) -> list[dict[str, Any]]:
    answer = await client.get("/v1/me/usage", headers={"authorization": f"Bearer {stage.issuer.token()}"})
    limits: list[dict[str, Any]] = answer.json()["limits"]
    return limits


async def test_all_tenants(put_up: PutUp, tmp_path: Path) -> None:
    stage = await put_up(plans=PLANS)
    async with stage.fake_worker(), stage.http() as client, desk(stage, tmp_path) as typed:
        assert (await stage.post(client)).status_code == 200
        await stage.trail(1)
        await stage.gateway.budgets.close()
        shown, listed, found = await typed("tenants"), await typed("tenants", "--csv"), await typed("tenants", "--json")
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.decode().splitlines()]
    assert rows == [
        ["tenant", "plan", "users", "limit", "used"],
        ["acme", "free", "1", "tokens_per_day", "19"],
        ["acme", "free", "1", "money_per_month", "(EUR),", "shared", "0.000019"],
        ["idle", "free", "0"],
    ]
    assert list(csv.reader(io.StringIO(listed.stdout.decode(), newline="")))[2] == [
        "acme", "free", "1", "money_per_month (EUR), shared", "0.000019",
    ]  # fmt: skip
    assert [each["tenant"] for each in json.loads(found.stdout)["tenants"]] == ["acme", "idle"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("top-up", "5", "--limit", "tokens_per_minute", *ALICE), 3, "The plans have no such limit"),
        (("top-up", "5", "--limit", "tokens_per_day", "--plan", "gold"), 3, "The plans have no such limit"),
        (("top-up", "5", "--limit", "concurrent_streams", *ALICE), 1, "change plans.toml"),
        (("top-up", "5", "--limit", "tokens_per_week", *ALICE), 1, "limit: Input should be"),
        (("top-up", "0", "--limit", "tokens_per_day", *ALICE), 1, "greater than 0"),
        (("top-up", "1.5", "--limit", "tokens_per_day", *ALICE), 1, "no whole number"),
        (("top-up", "1" * 5000, "--limit", "tokens_per_day", *ALICE), 1, "no whole number"),
        (("top-up", "5 EUR", "--limit", "money_per_month", "--tenant", "acme"), 1, "12.50"),
        (("top-up", "5", "--limit", "tokens_per_day"), 1, "name the budget"),
        (("reset", "--limit", "tokens_per_day", "--user", "alice"), 1, "name the budget"),
        (("reset", "--limit", "tokens_per_day", "--tenant", "a/b"), 1, "tenant"),
        (("reset", "--limit", "tokens_per_day", *ALICE, "--issuer", "https://nobody.example"), 3, "arguments"),
        (("reset", "--limit", "tokens_per_day", *ALICE, "--id", "a b"), 1, "id"),
        (("tenants", "--admin", "http://gateway.example:8322"), 1, "no address of an admin API"),
        (("tenants", "--admin", "nonsense"), 1, "no address of an admin API"),
    ],
)
async def test_what_cannot_be_done(put_up: PutUp, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    stage = await put_up(plans=PLANS)
    async with desk(stage, tmp_path) as typed:
        done = await typed(*arguments)
    assert (done.returncode, said in done.stderr.decode()) == (code, True), done.stderr
    assert stage.budgets.entries == {}
    for line in stage.logged():
        if line.get("status") == 422:
            assert line["reason"]


async def test_a_caller_who_may_not(put_up: PutUp, tmp_path: Path) -> None:
    """The request id leads to the reason in the log."""
    stage = await put_up(plans=PLANS)
    async with desk(stage, tmp_path, scope="") as typed:
        done = await typed("reset", "--limit", "tokens_per_day", *ALICE)
        assert done.returncode == 3
        [line] = [line for line in stage.logged() if line.get("status") == 403]
        assert line["request_id"] in done.stderr.decode() and line["reason"]
        done = await typed("reset", "--limit", "tokens_per_day", *ALICE, LACRE_TOKEN="not one")
        assert (done.returncode, b"one access token" in done.stderr) == (1, True)


async def test_a_budget_that_cannot_be_reached_names_the_id_to_repeat(put_up: PutUp, tmp_path: Path) -> None:
    stage = await put_up(plans=PLANS)
    stage.gateway.budgets.bucket = None
    async with desk(stage, tmp_path) as typed:
        done = await typed("top-up", "5", "--limit", "tokens_per_day", *ALICE, "--id", "t1")
        assert (done.returncode, b"run the command again with --id t1" in done.stderr) == (3, True), done.stderr
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        done = await typed("top-up", "5", "--limit", "tokens_per_day", *ALICE, "--admin", f"http://127.0.0.1:{port}")
    assert (done.returncode, b"run the command again with --id " in done.stderr) == (4, True), done.stderr


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [(200, b"[]", InvalidMessage), (200, b"{}", InvalidMessage),
     (200, b"x" * (MAX_ANSWER + 1), InvalidMessage), (200, b"[" * 10**5, InvalidMessage),
     (302, b"", RefusedError), (500, b"<html>", RefusedError), (502, b"", RefusedError), (418, b"{}", RefusedError)],
)  # fmt: skip
def test_somebody_else_at_that_address(status: int, content: bytes, error: type[Exception]) -> None:
    """Its words are not shown."""
    with AdminApi("http://127.0.0.1:1", "t") as api:
        api._client.close()
        answer = httpx2.Response(status, stream=Stream([content]), headers={"location": "http://127.0.0.1:2/"})
        api._client = httpx2.Client(base_url="http://x", transport=httpx2.MockTransport(lambda _: answer))
        with pytest.raises(error) as caught:
            api.get("/v1/tenants", TenantsReport)
    assert "<html>" not in str(caught.value)


def test_where_the_admin_api_is(tmp_path: Path) -> None:
    def where(admin: Admin | None, public: str = "https://gw.example:8321") -> str:
        made = GatewaySettings.model_construct(admin=admin, public_url=public)
        return address_of(made, tmp_path / "gateway.toml")

    assert where(Admin()) == "http://127.0.0.1:8322"
    assert where(Admin(host="::1", port=9)) == "http://[::1]:9"
    assert where(Admin(host="0.0.0.0")) == "https://gw.example:8322"
    with pytest.raises(SettingsError, match=r"no admin API: add a table \[admin\]"):
        where(None)


@pytest.mark.parametrize("text", ["", "a b", "t\x00", "ä", "\n"])
def test_a_token_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(SettingsError, match="one access token"):
        admin_token(tmp_path / "t")


def test_names_that_a_spreadsheet_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    say_csv(("name",), [("=1+1",), ("-x",), ("@x",), ('a"b,c',)])
    assert capsys.readouterr().out == 'name\r\n\'=1+1\r\n\'-x\r\n\'@x\r\n"a""b,c"\r\n'
