"""What strangers, other sites and hostile names try against the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lacre_gateway.console.sessions import MAX_COOKIE, MAX_SPENT, CookieTooLong, Sessions
from lacre_gateway.console.site import back_in
from lacre_gateway.policy.rules import copy_shipped
from parts.console_browser import SETTINGS, URL, Desk, Person
from parts.stage import until

from .conftest import PutUp

EVIL = "https://evil.example"
FORM = "application/x-www-form-urlencoded"
SCRIPT = "<script>alert(1)</script>"
CHANGES = (
    "/console/drain", "/console/top-up", "/console/reset", "/console/revoke", "/console/policy/reload", "/console/policy/test",
    "/console/policy/replay", "/console/audit/verify", "/console/sign-out", "/console/workers/drain", "/console/workers/resume",
)  # fmt: skip


# Forms of other sites


@pytest.mark.parametrize("path", CHANGES)
async def test_a_form_of_another_site_does_nothing(desk: Desk, root: Person, path: str) -> None:
    good, other = await root.csrf(), await (await desk.signed_in()).csrf()
    assert good != other
    before = len(desk.stage.entries("admin", "event"))
    for origin, csrf in ((URL, "-"), (URL, other), (EVIL, good), ("null", good), ("", good), (f"{URL}.evil.example", good)):
        refused = await root.send(path, origin=origin, csrf=csrf, candidate="x", subject="a", tenant="b", sub="alice")
        assert refused.status_code == 403, (origin, csrf)
        assert "did not come from this session" in refused.text
    assert len(desk.stage.entries("admin", "event")) == before
    assert not desk.stage.gateway.draining
    assert (await root.get("/console/me")).status_code == 200


@pytest.mark.parametrize("path", CHANGES)
async def test_a_get_changes_nothing(desk: Desk, root: Person, path: str) -> None:
    assert (await root.get(f"{path}?csrf={await root.csrf()}&sub=alice")).status_code == 405
    assert not desk.stage.gateway.draining
    assert list(desk.stage.gateway.revocations) == []


@pytest.mark.parametrize("path", CHANGES)
async def test_a_form_needs_a_session(desk: Desk, path: str) -> None:
    assert (await desk.person().send(path, csrf="x")).status_code == 401


async def test_fetch_metadata_of_another_site(root: Person) -> None:
    """Even where the origin says otherwise."""
    fields = {"csrf": await root.csrf()}
    headers = {"origin": URL, "sec-fetch-site": "cross-site"}
    assert (await root.http.post("/console/drain", data=fields, headers=headers)).status_code == 403


@pytest.mark.parametrize(
    ("content", "media"),
    [("csrf=a&csrf=b", FORM), ('{"csrf": 1}', "application/json"), ("&".join(map("{}=1".format, range(80))), FORM),
     (b"\xff", FORM)],
)  # fmt: skip
async def test_no_form(root: Person, content: Any, media: str) -> None:
    answer = await root.http.post("/console/drain", content=content, headers={"origin": URL, "content-type": media})
    assert answer.status_code == 422


async def test_a_form_has_an_end(root: Person) -> None:
    headers = {"origin": URL, "content-type": "application/x-www-form-urlencoded"}
    assert (await root.http.post("/console/drain", content=b"a=" + b"x" * 20_000, headers=headers)).status_code == 413


# Sessions


async def test_a_session_is_sealed(desk: Desk, root: Person) -> None:
    cookie, sessions = root.session, desk.console.site.sessions
    thief = desk.person()
    other = Sessions(secure=False, instance="g1", clock=desk.clock)
    _, foreign = other.begin(desk.admin(), desk.clock() + 60, desk.clock() + 60)
    flow, sign_in = sessions.begin_flow("/console/", again=False)
    value = foreign.partition("=")[2].partition(";")[0]
    as_flow = sign_in.partition("=")[2].partition(";")[0]
    forged = [
        "", "x", cookie[:-1] + ("A" if cookie[-1] != "A" else "B"), "A" + cookie[1:], cookie[:40], cookie + "A", value, as_flow,
        "A" * MAX_COOKIE, "A" * (MAX_COOKIE + 1),
    ]  # fmt: skip
    for wrong in forged:
        thief.session = wrong
        answer = await thief.get("/console/me")
        assert (answer.status_code, answer.headers["location"]) == (303, "/console/sign-in?back=/console/me"), wrong
    assert sessions.take_flow({sessions.flow_name: cookie}, flow.state) is None
    thief.session = cookie
    assert (await thief.get("/console/me")).status_code == 200  # the cookie itself is what must not be stolen


def test_sign_ins_of_strangers_keep_nobody_from_theirs() -> None:
    sessions = Sessions(secure=False, instance="g1", clock=lambda: 1000.0)

    def again_and_again() -> list[bool]:
        flow, cookie = sessions.begin_flow("/console/", again=False)
        cookies = {sessions.flow_name: cookie.partition("=")[2].partition(";")[0]}
        return [sessions.take_flow(cookies, flow.state) is not None for _ in range(2)]

    used = [again_and_again() for _ in range(MAX_SPENT + 10)]
    assert used == [[True, False]] * (MAX_SPENT + 10)
    assert len(sessions._spent) == MAX_SPENT


async def test_a_session_that_was_planted_is_not_continued(desk: Desk) -> None:
    victim, attacker = desk.person(), await desk.signed_in(desk.admin(sub="mallory"))
    planted = attacker.session
    victim.session = planted
    entered = await victim.open(desk.admin(sub="victoria"))
    assert entered.headers["set-cookie"]
    assert victim.session != planted
    assert "victoria" in (await victim.get("/console/me")).text
    assert (await attacker.get("/console/me")).status_code == 303, "the planted session ended at that sign-in"


async def test_a_session_ends(desk: Desk, root: Person) -> None:
    old = root.session
    assert (await root.send("/console/sign-out")).status_code == 303
    root.session = old
    assert (await root.get("/console/me")).status_code == 303, "a signed-out cookie opens nothing"
    root = await desk.signed_in()
    desk.clock.ahead += 8 * 3600
    assert (await root.get("/console/me")).status_code == 303, "it is too old"


async def test_a_session_ends_with_its_token(desk: Desk) -> None:
    person = await desk.signed_in(desk.admin(exp=int(desk.clock()) + 30))
    assert (await person.get("/console/me")).status_code == 200
    desk.clock.ahead += 60
    assert (await person.get("/console/me")).status_code == 303


async def test_a_revoked_token_ends_its_session(desk: Desk) -> None:
    person, root = await desk.signed_in(desk.admin(sub="leaving", jti="one")), await desk.signed_in()
    assert (await person.get("/console/me")).status_code == 200
    assert (await root.send("/console/revoke", sub="leaving")).status_code == 303
    gone = await person.get("/console/me")
    assert gone.status_code == 303
    assert "Max-Age=0" in gone.headers["set-cookie"]


async def test_a_change_needs_a_fresh_sign_in(desk: Desk, root: Person) -> None:
    desk.clock.ahead += 299
    assert "Drain gateway" in (await root.get("/console/workers")).text
    desk.clock.ahead += 2
    assert "Drain gateway g1</button>" not in (await root.get("/console/workers")).text
    refused = await root.send("/console/drain")
    assert refused.status_code == 403
    assert "A change needs a fresh sign-in" in refused.text
    assert not desk.stage.gateway.draining
    assert (await root.send("/console/audit/verify")).status_code == 200, "what changes nothing needs none"


@pytest.mark.parametrize("secure", [False, True])
def test_flags_of_cookies(secure: bool) -> None:
    sessions = Sessions(secure=secure, instance="g1", clock=lambda: 0.0)
    for cookie in (sessions.begin("t", 60, 60)[1], sessions.begin_flow("/console/", again=False)[1], sessions.forget()):
        flags = cookie.split("; ")
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(flags)
        assert ("Secure" in flags) is secure
        assert flags[0].startswith("__Host-") is secure
        assert not any(flag.startswith("Domain") for flag in flags)
    assert sessions.name != Sessions(secure=secure, instance="g2", clock=lambda: 0.0).name, "all ports of a host share cookies"


def test_a_token_that_fits_no_cookie() -> None:
    import secrets  # noqa: PLC0415

    sessions = Sessions(secure=True, instance="g1", clock=lambda: 0.0)
    assert len(sessions.begin(secrets.token_urlsafe(2500), 60, 60)[1]) < MAX_COOKIE + 200
    with pytest.raises(CookieTooLong, match="browsers keep 4000"):
        sessions.begin(secrets.token_urlsafe(4000), 60, 60)


# Links


async def test_a_link_works_once(desk: Desk) -> None:
    person, thief = desk.person(), desk.person()
    link = await person.link(desk.admin())
    code = link.partition("code=")[2]
    for _ in range(2):
        looked = await person.get(link)
        assert "root of acme" in looked.text, "looking, as a prefetch does, uses nothing up"
        assert "set-cookie" not in looked.headers
    crossed = await thief.http.post("/console/open", data={"code": code}, headers={"origin": EVIL})
    assert crossed.status_code == 403
    assert (await person.http.post("/console/open", data={"code": code}, headers={"origin": URL})).status_code == 303
    assert (await thief.http.post("/console/open", data={"code": code}, headers={"origin": URL})).status_code == 403
    assert thief.session == ""
    old = (await person.link(desk.admin())).partition("code=")[2]
    desk.clock.ahead += 61
    assert (await thief.http.post("/console/open", data={"code": old}, headers={"origin": URL})).status_code == 403


async def test_links_are_bounded(desk: Desk) -> None:
    person, headers = desk.person(), {"authorization": f"Bearer {desk.admin()}"}
    made = [(await person.http.post("/v1/console/links", headers=headers)).status_code for _ in range(65)]
    assert made == [201] * 64 + [429]


# Addresses and hosts


@pytest.mark.parametrize(
    "back",
    [
        EVIL, "//evil.example", "/\\evil.example", "/console/../../x", "/console/x//evil", "javascript:alert(1)", "/v1/status",
        "/console/\r\nset-cookie: a=b", "/console/%0d%0a", "/console/x?a=<script>", "console/", "",
    ],
)  # fmt: skip
async def test_no_way_to_another_site(desk: Desk, back: str) -> None:
    assert back_in(back) == "/console/"
    shown = await desk.person().get("/console/sign-in", params={"back": back})
    assert shown.status_code == 200
    assert "evil" not in shown.text
    assert "<script>" not in shown.text


def test_the_way_back() -> None:
    for back in ("/console/", "/console/requests?subject=a%20b&outcome=answered", "/console/tenant?tenant=acme"):
        assert back_in(back) == back


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:8322", "127.0.0.1:9"])
async def test_another_name_of_this_machine(desk: Desk, root: Person, host: str) -> None:
    """A page of that name would be of another origin to the browser, and reach this port after a change of DNS."""
    for path in ("/console/", "/console/sign-in", "/console/static/style.css", "/console/start", "/console/callback"):
        answer = await root.get(path, headers={"host": host})
        assert answer.status_code == 421, path
        assert "root" not in answer.text
    posted = await root.http.post("/console/drain", data={"csrf": await root.csrf()}, headers={"host": host, "origin": URL})
    assert posted.status_code == 421
    assert not desk.stage.gateway.draining


# Names that are scripts


async def test_hostile_names(put_up: PutUp, tmp_path: Path) -> None:
    """Of a user, a group, a rule and its text, in every page, and what a form sends back."""
    copy_shipped(tmp_path / "rules")
    (tmp_path / "rules" / "hostile.cedar").write_text(
        f'@id("{SCRIPT}")\n@note("</pre>{SCRIPT}")\n'
        f'forbid (principal, action == Action::"http", resource) when {{ context.scopes.contains("</pre>{SCRIPT}") }};\n'
    )
    desk = Desk(await put_up(settings=f'{SETTINGS}policies = "{tmp_path / "rules"}"'))
    stage = desk.stage
    root = await desk.signed_in(desk.admin(sub=SCRIPT, groups=[SCRIPT]))
    token = stage.issuer.token(sub=SCRIPT, groups=[SCRIPT, '"><img src=x onerror=alert(1)>'])
    async with stage.fake_worker(), stage.http() as client:
        client.headers["user-agent"] = SCRIPT
        assert (await stage.post(client, token)).status_code == 200
    [intent, _] = await stage.trail()
    pages = [
        "/console/", "/console/me", "/console/tenants", "/console/tenant?tenant=acme", "/console/requests", "/console/policy",
        f"/console/request?id={intent['request_id']}", "/console/keys", "/console/workers", "/console/audit",
        f"/console/requests?subject={SCRIPT}", f"/console/requests?id={SCRIPT}", f"/console/tenant?tenant={SCRIPT}",
        f"/console/?done={SCRIPT}", f"/console/requests?since={SCRIPT}", f"/console/nowhere{SCRIPT}",
    ]  # fmt: skip
    seen = 0
    for path in pages:
        shown = (await root.get(path)).text
        assert "<script>" not in shown, path
        assert "<img" not in shown, path
        seen += "&lt;script&gt;" in shown
    assert seen >= 6, "the names are there, escaped"
    for path, fields in (
        ("/console/policy/test", {"subject": SCRIPT, "tenant": SCRIPT, "action": "chat", "groups": SCRIPT}),
        ("/console/policy/replay", {"candidate": f"</textarea>{SCRIPT}"}),
    ):
        shown = (await root.send(path, **fields)).text
        assert "<script>" not in shown
        assert "&lt;script&gt;" in shown


async def test_no_word_of_content_and_no_token(desk: Desk, root: Person) -> None:
    """A prompt with a canary goes through; no page, call, file or log line has it, nor an access token."""
    stage, token = desk.stage, desk.admin(sub="root", jti="seen")
    person = await desk.signed_in(token)
    sealed, _ = stage.seal(content=stage.prompt.encode())[:2]
    async with stage.fake_worker(), stage.http() as client:
        assert (await stage.post(client, stage.token, body=sealed)).status_code == 200
    [intent, _] = await stage.trail()
    shown = []
    for path in (
        "/console/", "/console/requests", f"/console/request?id={intent['request_id']}", "/console/tenant?tenant=acme",
        "/console/me", "/console/audit/export", "/console/policy", f"/console/proof?id={intent['request_id']}",
    ):  # fmt: skip
        answer = await person.get(path)
        assert answer.status_code == 200
        shown += [answer.text, str(answer.headers)]
    desk.console.index.catch_up()
    kept = b"".join(path.read_bytes() for path in desk.console.folder.iterdir())
    await until(stage.logged)
    whole = "\n".join([*shown, stage.log.getvalue(), kept.decode("latin-1")])
    for secret in (stage.canary, token, stage.token, token.rpartition(".")[2]):
        assert secret not in whole
    assert intent["request_id"] in whole
