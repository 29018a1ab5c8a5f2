"""What other sites, thieves of a browser and hostile names try against the operators' console."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from hostile.attacks import Verdict, attack
from lacre import problems
from lacre_gateway.console.site import CROSS_SITE, NOT_FRESH, NOT_SIGNED_IN, WRONG_HOST
from parts.console_browser import SETTINGS, URL, Desk, Person
from parts.issuer import Issuer
from parts.stage import Stage

EVIL = "https://evil.example"
SCRIPT = "<script>alert(1)</script>"
KNOWN = (CROSS_SITE, NOT_FRESH, NOT_SIGNED_IN, WRONG_HOST, problems.INVALID_TOKEN)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with Stage.on_air(tmp_path, Issuer(), settings=SETTINGS) as stage:
        yield Desk(stage)


@pytest.fixture
async def operator(desk: Desk) -> Person:
    return await desk.signed_in()


def said(answer: httpx2.Response) -> str:
    """The type of the problem that a page shows."""
    return next(problem.type for problem in KNOWN if f"<code>{problem.slug}</code>" in answer.text)


@attack("have an operator's browser send a form to the console from another site", "stranger",
        "a form has the `Origin` of `console.url`", CROSS_SITE)  # fmt: skip
async def test_origin(desk: Desk, operator: Person, verdict: Verdict) -> None:
    refused = await operator.send("/console/drain", origin=EVIL)
    assert not desk.stage.gateway.draining
    verdict.said(said(refused))


@attack("have a page of the console's own origin send a form that it did not get", "stranger",
        "each form carries a token of its session", CROSS_SITE)  # fmt: skip
async def test_form(desk: Desk, operator: Person, verdict: Verdict) -> None:
    refused = await operator.send("/console/drain", csrf=await (await desk.signed_in()).csrf())
    assert not desk.stage.gateway.draining
    verdict.said(said(refused))


@attack("reach an operator's console from a page by another name of its address (DNS rebinding)", "stranger",
        "`Host` is the one of `console.url`", WRONG_HOST)  # fmt: skip
async def test_host(operator: Person, verdict: Verdict) -> None:
    refused = await operator.get("/console/", headers={"host": "evil.example:8322"})
    assert "acme" not in refused.text
    verdict.said(said(refused))


@attack("use the cookie of an operator who signed out", "stranger", "a session that was ended is remembered until it would end",
        problems.INVALID_TOKEN)  # fmt: skip
async def test_signed_out(desk: Desk, operator: Person, verdict: Verdict) -> None:
    cookie, csrf = operator.session, await operator.csrf()
    await operator.send("/console/sign-out")
    operator.session = cookie
    refused = await operator.send("/console/drain", csrf=csrf)
    assert not desk.stage.gateway.draining
    verdict.said(said(refused))


@attack("change something at a browser that an operator left hours ago", "stranger",
        "a change needs a sign-in of the last minutes", NOT_FRESH)  # fmt: skip
async def test_left_alone(desk: Desk, verdict: Verdict) -> None:
    operator = await desk.signed_in(desk.admin(exp=int(desk.clock()) + 7200))
    desk.clock.ahead += 3600
    refused = await operator.send("/console/drain")
    assert not desk.stage.gateway.draining
    verdict.said(said(refused))


@attack("open a link of `lacre admin open` that someone opened before", "stranger", "a link signs in once, and for a minute",
        NOT_SIGNED_IN)  # fmt: skip
async def test_link(desk: Desk, operator: Person, verdict: Verdict) -> None:
    code = (await operator.link(desk.admin())).partition("code=")[2]
    thief = desk.person()
    answers = [await one.http.post("/console/open", data={"code": code}, headers={"origin": URL}) for one in (operator, thief)]
    assert (answers[0].status_code, thief.session) == (303, "")
    verdict.said(said(answers[1]))


@attack("run a script in an operator's browser by a user's name", "client",
        "pages escape every name, and run no script but the console's own", None, gain="the name is shown as text")  # fmt: skip
async def test_name(desk: Desk, operator: Person) -> None:
    async with desk.stage.fake_worker(), desk.stage.http() as client:
        answer = await desk.stage.post(client, desk.stage.issuer.token(sub=SCRIPT))
    assert answer.status_code == 200
    shown = await operator.get("/console/requests")
    assert "&lt;script&gt;" in shown.text
    assert "<script>" not in shown.text
    assert "script-src 'self'" in shown.headers["content-security-policy"]
