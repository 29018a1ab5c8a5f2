"""What each page shows, to whom, and what is recorded of it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import fingerprint
from lacre_fabric.work.presence import accepts_grants_of
from lacre_gateway.policy.rules import copy_shipped
from parts.console_browser import SETTINGS, Desk, Person
from parts.obedient import obedient
from parts.stage import Stage, until

from .conftest import PutUp

PAGES = {
    "/console/": "admin:usage", "/console/tenants": "admin:usage", "/console/tenant?tenant=acme": "admin:usage",
    "/console/tenants.csv": "admin:usage", "/console/tenants.csv?tenant=acme": "admin:usage",
    "/console/requests": "admin:audit", "/console/policy": "admin:audit", "/console/keys": "admin:usage",
    "/console/workers": "admin:usage", "/console/audit": "admin:audit", "/console/audit/checkpoint": "admin:audit",
    "/console/audit/export": "admin:audit",
}  # fmt: skip
CALLS = {
    "/v1/minutes": "admin:usage", "/v1/workers": "admin:usage", "/v1/requests": "admin:audit", "/v1/policy": "admin:audit",
    "/v1/keys": "admin:usage", "/v1/checkpoint": "admin:audit", "/v1/requests/usage?tenant=acme": "admin:usage",
}  # fmt: skip
ROLES = """
@id("readers")
permit (principal in Group::"acme/readers", action in [Action::"admin:usage", Action::"admin:audit"], resource);
"""


def recorded(stage: Stage) -> list[tuple[str, str, str | None]]:
    return [(entry["action"], entry["decision"], entry["target"]) for entry in stage.entries("admin")]


async def asked(stage: Stage, requests: int = 1) -> list[dict[str, Any]]:
    """Sealed requests that a worker answers."""
    async with stage.fake_worker(), stage.http() as client:
        for _ in range(requests):
            assert (await stage.post(client)).status_code == 200
    return await stage.trail(requests)


@pytest.mark.parametrize(("path", "action"), PAGES.items())
async def test_a_view_is_a_decision_and_an_entry(desk: Desk, root: Person, path: str, action: str) -> None:
    await asked(desk.stage)
    before = len(recorded(desk.stage))
    shown = await root.get(path)
    assert shown.status_code == 200, shown.text
    assert recorded(desk.stage)[before:] == [(action, "allow", "acme" if "tenant=" in path else None)]


async def test_every_page_has_strict_headers(desk: Desk, root: Person) -> None:
    for path in [*PAGES, "/console/me", "/console/sign-in", "/console/nowhere-in-it", "/console/request?id=" + "0" * 32]:
        shown = await root.get(path)
        if path == "/console/nowhere-in-it":
            assert shown.status_code == 404
            continue
        policy = shown.headers["content-security-policy"]
        for part in (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ):
            assert part in policy, path
        assert "unsafe" not in policy
        assert shown.headers["cache-control"] == "no-store"
        assert shown.headers["x-frame-options"] == "DENY"
        assert shown.headers["x-content-type-options"] == "nosniff"
        assert "<script>" not in shown.text
        assert " style=" not in shown.text
        assert " onclick" not in shown.text


async def test_our_files(desk: Desk) -> None:
    person = desk.person()
    for name, kind in (("style.css", "text/css"), ("live.mjs", "text/javascript"), ("icon.svg", "image/svg+xml")):
        found = await person.get(f"/console/static/{name}")
        assert found.status_code == 200
        assert found.headers["content-type"].startswith(kind)
    for wrong in ("..", "../site.py", "base.html", "%2e%2e/site.py"):
        assert (await person.get(f"/console/static/{wrong}")).status_code in (308, 400, 404)


@pytest.mark.parametrize(("path", "action"), CALLS.items())
async def test_the_api_has_what_pages_show(desk: Desk, path: str, action: str) -> None:
    await asked(desk.stage)
    async with desk.stage.http(app=desk.stage.admin) as client:
        assert (await client.get(path)).status_code == 401
        denied = await client.get(path, headers={"authorization": f"Bearer {desk.admin('lacre:http')}"})
        allowed = await client.get(path, headers={"authorization": f"Bearer {desk.admin()}"})
        document = (await client.get("/openapi.json")).json()
    assert (denied.status_code, allowed.status_code) == (403, 200)
    target = "acme" if "tenant=" in path else None
    assert recorded(desk.stage) == [(action, "deny", target), (action, "allow", target)]
    assert path.partition("?")[0] in document["paths"]
    assert not [name for name in document["paths"] if name.startswith("/console")]


async def test_roles(put_up: PutUp, tmp_path: Path) -> None:
    """A reader sees and changes nothing, an operator does both, and someone without a role sees the own page alone."""
    copy_shipped(tmp_path / "rules")
    (tmp_path / "rules" / "roles.cedar").write_text(ROLES)
    desk = Desk(await put_up(settings=f'{SETTINGS}policies = "{tmp_path / "rules"}"'))
    reader = await desk.signed_in(desk.admin("", sub="rita", groups=["readers"]))
    home = await reader.get("/console/")
    assert home.status_code == 200
    assert "Drain gateway" not in (await reader.get("/console/workers")).text
    assert (await reader.send("/console/drain")).status_code == 403
    assert not desk.stage.gateway.draining
    operator = await desk.signed_in(desk.admin(sub="olga"))
    assert "Drain gateway" in (await operator.get("/console/workers")).text
    assert (await operator.send("/console/drain")).status_code == 303
    assert desk.stage.gateway.draining
    assert recorded(desk.stage)[-1] == ("admin:drain", "allow", None)


async def test_a_worker_is_drained_by_a_form(desk: Desk, root: Person) -> None:
    async with desk.stage.fake_worker() as worker:
        state = obedient(desk.stage, worker.fabric)
        page = (await root.get("/console/workers")).text
        assert 'action="/console/workers/drain"' in page
        assert "1.0</td>" in page, "its version"
        named = {"pool": "default", "region": "lacre", "node": "node-0"}
        done = await root.send("/console/workers/drain", **named)
        assert (done.status_code, done.headers["location"]) == (303, "/console/workers?done=worker-drained")
        assert state.reason() is not None
        page = (await root.get(done.headers["location"])).text
        assert "takes no more work" in page
        assert '<span class="tag warn">drained</span>' in page
        assert 'action="/console/workers/resume"' in page
        assert recorded(desk.stage)[-2] == ("admin:drain_worker", "allow", "default/lacre/node-0#drain")
        assert (await root.send("/console/workers/resume", **named)).status_code == 303
        assert state.reason() is None
        assert (await root.send("/console/workers/drain", **named | {"node": "n7"})).status_code == 404
        assert (await root.send("/console/workers/drain", **named | {"node": "*"})).status_code == 422
        worker.fabric.on_order = None
        assert "hears none" in (await root.get("/console/workers")).text
        assert (await root.send("/console/workers/drain", **named)).status_code == 409
        desk.clock.ahead = 400
        page = (await root.get("/console/workers")).text
        assert "/console/workers/drain" not in page
        assert "lacre admin open" in page


async def test_who_still_has_an_old_key(desk: Desk, root: Person) -> None:
    manifest = desk.stage.gateway.feed.manifest
    newest, *others = [fingerprint(key.config) for key in manifest.pools["default"].keys]
    grants = accepts_grants_of(manifest.gateway_key)
    async with desk.stage.fake_worker() as up_to_date, desk.stage.fake_worker() as behind:
        up_to_date.fabric.keys = frozenset({newest, *others, grants})
        behind.fabric.keys = frozenset({"O" * 16, "<b>no fingerprint", *others})
        page = (await root.get("/console/keys")).text
        async with desk.stage.http(app=desk.stage.admin) as client:
            told = (await client.get("/v1/keys", headers={"authorization": f"Bearer {desk.admin()}"})).json()
    by = {key["key"].rpartition(" ")[2]: key for key in told["keys"] if key["what"] == "pool"}
    assert (by[newest]["held"], by[newest]["missing"]) == (1, ["node-1"])
    assert all((by[name]["held"], by[name]["missing"]) == (2, []) for name in others)
    assert told["unlisted"] == [{"pool": "default", "key": "O" * 16, "workers": ["node-1"]}]
    waits = [(one["what"], one["of"], one["waits"]) for one in told["rotations"]]
    assert any(what == "pool" and waits.startswith("node-1: without key") for what, _, waits in waits)
    assert any(what == "grants" and waits.startswith("node-1 of default") for what, _, waits in waits)
    assert "Keys outside the manifest" in page and "O" * 16 in page
    assert "<b>no" not in page and "no fingerprint" not in page
    assert "Keys outside the manifest" not in (await root.get("/console/keys")).text


async def test_what_is_of_this_gateway_alone_is_said_so(desk: Desk, root: Person) -> None:
    """An operator of two rotates a key at both: each says with which key it signs."""
    gateway = desk.stage.gateway
    async with desk.stage.http(app=desk.stage.admin) as client:
        told = (await client.get("/v1/keys", headers={"authorization": f"Bearer {desk.admin()}"})).json()
    page = (await root.get("/console/keys")).text
    signs = b64u(raw_public_key(gateway.key))
    assert told["gateway"] == gateway.settings.instance and signs.startswith(told["signs"]) and len(told["signs"]) == 16
    assert f"what this page knows of {told['gateway']} alone" in page
    assert f"<code>{told['signs']}</code>" in page and "lacre doctor" in page


async def test_nobody_sees_nothing(desk: Desk) -> None:
    """No rule permits this person anything: a link is refused, and with a session from before only the own page is shown."""
    nobody = desk.person()
    token = desk.admin("lacre:http", sub="nemo")
    refused = await nobody.http.post("/v1/console/links", headers={"authorization": f"Bearer {token}"})
    assert refused.status_code == 403
    _, cookie = desk.console.site.sessions.begin(token, desk.clock() + 60, desk.clock() + 60)
    nobody.session = cookie.partition("=")[2].partition(";")[0]
    home = await nobody.get("/console/")
    assert (home.status_code, home.headers["location"]) == (303, "/console/me")
    own = await nobody.get("/console/me")
    assert own.status_code == 200
    assert "nemo" in own.text
    for page in ("tenants", "requests", "policy", "keys", "workers", "audit"):
        assert f'href="/console/{page}"' not in own.text
        denied = await nobody.get(f"/console/{page}")
        assert denied.status_code == 403
        assert "admin:" in denied.text
    for path in PAGES:
        if path != "/console/":
            assert (await nobody.get(path)).status_code == 403, path


async def test_a_request_is_found_and_explained(desk: Desk, root: Person) -> None:
    trail = await asked(desk.stage, 3)
    name = trail[0]["request_id"]
    listed = (await root.get("/console/requests?subject=alice")).text
    assert all(entry["request_id"][:8] in listed for entry in trail)
    assert "No request of the log fits" in (await root.get("/console/requests?subject=bob")).text
    assert "No request of the log fits" in (await root.get("/console/requests?until=2020-01-01T00:00")).text
    assert name[:8] in (await root.get("/console/requests?since=2020-01-01T00:00&outcome=answered")).text
    shown = (await root.get(f"/console/request?id={name}")).text
    for word in ("models-for-everyone", "alice", "acme", "answered", "the same set decided then"):
        assert word in shown
    proof = await root.get(f"/console/proof?id={name}")
    assert proof.headers["content-disposition"] == f'attachment; filename="lacre-proof-{name}.txt"'
    found = AuditProof.parse(proof.text)
    found.verify(desk.stage.gateway.audit.public)
    assert name.encode() in found.entry
    assert (await root.get("/console/request?id=" + "0" * 32)).status_code == 404
    assert (await root.get("/console/request?id=1")).status_code == 422


async def test_pages_of_requests(desk: Desk, root: Person) -> None:
    """Older ones follow by the number of the last one; none twice, none missing."""
    async with desk.stage.http() as client:
        for number in range(70):
            await desk.stage.post(client, desk.stage.issuer.token(sub=f"user-{number}"))
    await asyncio.to_thread(desk.console.index.catch_up)
    async with desk.stage.http(app=desk.stage.admin) as client:
        headers = {"authorization": f"Bearer {desk.admin()}"}
        seen: list[str] = []
        before = ""
        while True:
            answer = (await client.get(f"/v1/requests?tenant=acme&{before}", headers=headers)).json()
            seen += [one["subject"] for one in answer["requests"] if one["kind"] == "intent"]
            if answer["next"] is None:
                break
            before = f"before={answer['next']}"
    assert seen == [f"user-{number}" for number in range(69, -1, -1)]


async def test_policy_is_tested_and_replayed(desk: Desk, root: Person) -> None:
    await asked(desk.stage, 2)
    question = {"subject": "bob", "tenant": "acme", "action": "http", "pool": "default", "model": "m"}
    denied = await root.send("/console/policy/test", **question, scopes="x", max_tokens="5")
    assert denied.status_code == 200
    assert "because no rule permits it" in denied.text
    allowed = await root.send("/console/policy/test", **question, scopes="lacre:http", max_tokens="5")
    assert "http-by-scope" in allowed.text
    assert '<span class="tag good">allowed</span>' in allowed.text
    assert (await root.send("/console/policy/test", **{**question, "action": "fly"})).status_code == 422
    replayed = await root.send("/console/policy/replay", candidate='@id("nothing") forbid (principal, action, resource);')
    assert replayed.status_code == 200
    assert "decisions would change" in replayed.text
    assert replayed.text.count(">nothing<") >= 2
    wrong = await root.send("/console/policy/replay", candidate="permit everything;")
    assert wrong.status_code == 422
    assert "not valid Cedar" in wrong.text


async def test_limits_are_raised_by_a_form(put_up: PutUp) -> None:
    plans = """
        currency = "EUR"
        default_plan = "free"
        [plans.free.user]
        tokens_per_day = 100000
        [tenants.acme]
        tokens_per_day = 5000
    """
    desk = Desk(await put_up(settings=SETTINGS, plans=plans))
    root = await desk.signed_in()
    named = {"page": "acme", "tenant": "acme", "scope": "tenant", "limit": "tokens_per_day", "plan": "", "sub": ""}
    done = await root.send("/console/top-up", **named, amount="700")
    assert (done.status_code, done.headers["location"]) == (303, "/console/tenant?tenant=acme&done=topped-up"), done.text
    page = await root.get(done.headers["location"])
    assert "The limit is raised" in page.text
    async with desk.stage.fake_worker(), desk.stage.http() as client:
        assert (await desk.stage.post(client)).status_code == 200
    await desk.stage.outcomes(1)
    await desk.stage.gateway.budgets.close()  # what it holds is written down
    home = (await root.get("/console/")).text
    assert "tokens per day" in home
    assert "5\u202f700" in home
    await until(lambda: [e for e in desk.stage.entries("event") if e["event"] == "budget-topped-up"])
    [event] = [e for e in desk.stage.entries("event") if e["event"] == "budget-topped-up"]
    assert (event["actor"], event["count"]) == ("acme/root", 700)
    assert (await root.send("/console/top-up", **named, amount="many")).status_code == 422
    assert (await root.send("/console/reset", **{**named, "scope": "moon"})).status_code == 422


async def test_a_user_is_revoked_by_a_form(desk: Desk, root: Person) -> None:
    token = desk.stage.issuer.token(sub="mallory")
    done = await root.send("/console/revoke", sub="mallory", page="acme")
    assert done.status_code == 303
    async with desk.stage.http() as public:
        assert (await desk.stage.post(public, token)).status_code == 401


async def test_audit_is_verified_and_exported(desk: Desk, root: Person) -> None:
    await asked(desk.stage)
    verified = await root.send("/console/audit/verify")
    assert "The log holds" in verified.text
    lines = (await root.get("/console/audit/export")).text.splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("{") for line in lines)


async def test_a_gateway_without_console_loads_none_of_it(stage: Stage) -> None:
    code = (
        "import sys, lacre_gateway.serve, lacre_gateway.commands; ours = ('lacre_gateway.console', 'jinja2', 'sqlite3'); "
        "found = [name for name in sys.modules if name.startswith(ours)]; assert not found, found"
    )
    done = await anyio.run_process([sys.executable, "-P", "-c", code], check=False)
    assert done.returncode == 0, done.stderr.decode()
    async with stage.http(app=stage.admin) as client:
        headers = {"authorization": f"Bearer {stage.issuer.token(scope='lacre:admin')}"}
        for path in ("/console/", "/console/sign-in", "/v1/requests", "/console/static/style.css"):
            assert (await client.get(path, headers=headers)).status_code == 404
        assert (await client.post("/v1/console/links", headers=headers)).status_code == 404
