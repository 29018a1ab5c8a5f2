"""Signing in at an issuer that lies: nobody gets a session from an answer that does not hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_gateway.settings import Console
from parts.code_issuer import CLIENT, CodeIssuer, code_issuer
from parts.console_browser import SETTINGS, URL, Desk, Person
from parts.issuer import AUDIENCE, Issuer

from .conftest import PutUp


@pytest.fixture
def server(issuer: Issuer) -> Iterator[CodeIssuer]:
    with code_issuer(issuer) as server:
        yield server


@pytest.fixture
async def desk(put_up: PutUp, server: CodeIssuer) -> Desk:
    """With a second issuer, at which people sign in."""
    table = f"""
        [[issuers]]
        issuer = "{server.url}"
        audience = "{AUDIENCE}"
        algorithms = ["EdDSA"]
        jwks = "jwks.json"
    """
    settings = f'{SETTINGS}console.issuer = "{server.url}"\nconsole.client_id = "{CLIENT}"\nconsole.session = 3600\n'
    return Desk(await put_up(settings=settings, limits=table))


async def begun(person: Person, server: CodeIssuer, query: str = "") -> dict[str, str]:
    """What the browser brings back."""
    sent = await person.get(f"/console/start?{query}")
    assert sent.status_code == 303, sent.text
    assert sent.headers["location"].startswith(f"{server.url}/auth?")
    return server.agree(sent.headers["location"])


async def test_a_good_answer(desk: Desk, server: CodeIssuer) -> None:
    person = desk.person()
    said = await begun(person, server, "back=/console/requests?subject=alice")
    entered = await person.get("/console/callback", params=said)
    assert (entered.status_code, entered.headers["location"]) == (303, "/console/requests?subject=alice")
    assert (await person.get("/console/")).status_code == 200
    [form] = server.asked
    assert (form["redirect_uri"], form["client_id"]) == (f"{URL}/console/callback", CLIENT)
    assert "client_secret" not in form
    whole = desk.stage.log.getvalue()
    for secret in (said["code"], said["state"], form["code_verifier"], person.session):
        assert secret not in whole


LIES: dict[str, dict[str, Any]] = {
    "another nonce": {"identity": {"nonce": "x"}},
    "no nonce": {"identity": {"nonce": None}},
    "another client": {"identity": {"aud": "other"}},
    "several clients": {"identity": {"aud": [CLIENT, "other"]}},
    "another party": {"identity": {"azp": "other"}},
    "another issuer's": {"identity": {"iss": "https://issuer.example"}},
    "an old ID token": {"identity": {"exp": 1000}},
    "no end": {"identity": {"exp": None}},
    "another person's access token": {"access": {"sub": "mallory"}},
    "an access token of another issuer": {"access": {"iss": "https://issuer.example"}},
    "an access token for another audience": {"access": {"aud": "other"}},
    "an old access token": {"access": {"exp": 1000}},
    "a bound access token": {"access": {"cnf": {"jkt": "x"}}},
    "no time of presence": {"identity": {"auth_time": "soon"}},
    "no ID token": {"answer": {"id_token": None}},
    "no tokens": {"answer": {"access_token": 1, "id_token": []}},
    "an unsigned ID token": {"answer": {"id_token": "eyJhbGciOiJub25lIn0.e30."}},
    "no JWT": {"answer": {"access_token": "opaque"}},
    "a failure": {"status": 500},
    "a redirection": {"status": 302},
    "no end of it": {"padding": 300_000},
    "other metadata": {"described": {"issuer": "https://evil.example"}},
    "an endpoint in the clear": {"described": {"token_endpoint": "http://evil.example/token"}},
    "a stranger's keys": {"signer": Issuer()},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_lie(desk: Desk, server: CodeIssuer, lie: dict[str, Any]) -> None:
    person = desk.person()
    said = await begun(person, server)
    for name, value in lie.items():
        setattr(server, name, value)
    refused = await person.get("/console/callback", params=said)
    assert refused.status_code in (401, 403), refused.text
    assert person.session == ""
    assert (await person.get("/console/")).status_code == 303


@pytest.mark.parametrize(
    "change", [{"iss": "https://evil.example"}, {"state": "x"}, {"code": ""}, {"code": "x" * 5000}, {"error": "access_denied"}]
)
async def test_a_changed_answer(desk: Desk, server: CodeIssuer, change: dict[str, str]) -> None:
    person = desk.person()
    said = await begun(person, server)
    assert (await person.get("/console/callback", params={**said, **change})).status_code == 403
    assert person.session == ""


async def test_an_old_flow(desk: Desk, server: CodeIssuer) -> None:
    person = desk.person()
    said = await begun(person, server)
    desk.clock.ahead += 601
    assert (await person.get("/console/callback", params=said)).status_code == 403
    assert server.asked == []


async def test_an_issuer_that_does_not_ask_again(desk: Desk, server: CodeIssuer) -> None:
    """A sign-in for a change needs a new proof of presence; an old one gives no fresh session."""
    person = desk.person()
    server.identity = {"auth_time": int(time.time()) - 1000}
    assert (await person.get("/console/callback", params=await begun(person, server))).status_code == 303
    assert (await person.send("/console/drain")).status_code == 403, "it was long ago"
    assert (await person.get("/console/callback", params=await begun(person, server, "again"))).status_code == 403
    server.identity = {"auth_time": None}
    assert (await person.get("/console/callback", params=await begun(person, server, "again"))).status_code == 403
    server.identity = {"auth_time": int(time.time()) + 10**6}
    assert (await person.get("/console/callback", params=await begun(person, server))).status_code == 303
    desk.clock.ahead += 301
    assert (await person.send("/console/drain")).status_code == 403, "a time in the future holds no longer"
    assert not desk.stage.gateway.draining


async def test_a_console_without_an_issuer(put_up: PutUp) -> None:
    desk = Desk(await put_up(settings=SETTINGS))
    assert (await desk.person().get("/console/start")).status_code == 404
    assert "lacre admin open" in (await desk.person().get("/console/sign-in")).text


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (f'console.url = "{URL}"', "add a table \\[admin\\]"),
        (f'admin.port = 1\nconsole.url = "{URL}/"', "no path"),
        ('admin.port = 1\nconsole.url = "http://gateway.example"', "http on loopback only"),
        (f'admin.port = 1\nconsole.url = "{URL}"\nconsole.issuer = "https://issuer.example"', "both issuer and client_id"),
        (f'admin.port = 1\nconsole.url = "{URL}"\nconsole.issuer = "x"\nconsole.client_id = "x"', "must be one of"),
    ],
)
async def test_settings(put_up: PutUp, settings: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault):
        await put_up(settings=settings)


def test_several_processes_have_several_addresses() -> None:
    assert Console(url=URL).moved(2).url == "http://127.0.0.1:8324"
    assert Console(url="https://console.example").moved(2).url == "https://console.example"
