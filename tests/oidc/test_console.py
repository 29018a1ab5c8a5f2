"""People sign in to the console at a real OpenID provider: with roles, again for a change, and never by a stranger's answer."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx2
import pytest

from parts.browser import Form
from parts.console_site import Consoles, with_consoles
from parts.oidc_provider import NODE, Provider
from parts.waiting import PATIENCE, until

pytestmark = [pytest.mark.skipif(NODE is None or shutil.which("npm") is None, reason="node and npm are not installed")]
FORMS = 6  # of the provider, at most


@pytest.fixture
async def consoles(tmp_path: Path, provider: Provider) -> AsyncIterator[Consoles]:
    async with with_consoles(tmp_path, provider) as consoles:
        yield consoles


@pytest.fixture
async def arrive(consoles: Consoles) -> AsyncIterator[Callable[[], Visitor]]:
    """Makes browsers at the first console."""
    async with AsyncExitStack() as stack:

        def arrived() -> Visitor:
            visitor = Visitor(consoles.urls[0])
            stack.push_async_callback(visitor.http.aclose)
            return visitor

        yield arrived


class Visitor:
    """A browser without a screen that follows every redirect by itself, so that a test sees each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx2.AsyncClient(trust_env=False, timeout=30)
        self.seen: list[str] = []

    async def go(self, address: str, *, stop: str = "\0", **form: str) -> httpx2.Response:
        """The page at the end of the redirects; or the last answer before an address that begins with `stop`."""
        answer = await (self.http.post(address, data=form) if form else self.http.get(address))
        while answer.is_redirect:
            target = urljoin(str(answer.url), answer.headers["location"])
            self.seen.append(target)
            if target.startswith(stop):
                return answer
            answer = await self.http.get(target)
        return answer

    async def sign_in(self, name: str, start: str = "/console/start", stop: str = "\0") -> httpx2.Response:
        """At the provider's pages, as this person."""
        page = await self.go(self.url + start, stop=stop)
        for _ in range(FORMS):
            if page.is_redirect or str(page.url).startswith(self.url):
                return page
            form = Form(page.text)
            assert form.action is not None, page.text
            fields = {field: name if field == "login" else value for field, value in form.fields.items()}
            page = await self.go(urljoin(str(page.url), form.action), stop=stop, **fields)
        raise AssertionError("the provider has no end")

    async def get(self, path: str) -> httpx2.Response:
        return await self.http.get(self.url + path)

    async def csrf(self) -> str:
        return Form((await self.get("/console/me")).text).fields["csrf"]


async def test_roles(consoles: Consoles, arrive: Callable[[], Visitor]) -> None:
    """A reader, an operator and someone without a role: each by the provider's claims and the rules alone."""
    url = consoles.urls[0]
    reader, operator, nobody = arrive(), arrive(), arrive()
    assert (await reader.sign_in("reader-rita")).status_code == 200
    assert "<h1>Overview</h1>" in (await reader.get("/console/")).text
    assert (await reader.get("/console/requests")).status_code == 200
    drained = {"csrf": await reader.csrf()}
    assert (await reader.http.post(f"{url}/console/drain", data=drained, headers={"origin": url})).status_code == 403

    home = await nobody.sign_in("nemo")
    assert str(home.url) == f"{url}/console/me"
    assert "nemo" in home.text
    assert (await nobody.get("/console/requests")).status_code == 403

    assert (await operator.sign_in("operator-olga", "/console/start?back=/console/workers")).status_code == 200
    assert "Drain gateway" in (await operator.get("/console/workers")).text
    done = {"csrf": await operator.csrf()}
    assert (await operator.http.post(f"{url}/console/drain", data=done, headers={"origin": url})).status_code == 303
    await until(lambda: consoles.live.gateways[0].process.poll() is not None, PATIENCE)
    decided = {(entry["subject"], entry["action"], entry["decision"]) for entry in consoles.live.entries("admin")}
    assert {
        ("reader-rita", "admin:usage", "allow"), ("reader-rita", "admin:drain", "deny"), ("nemo", "admin:audit", "deny"),
        ("operator-olga", "admin:drain", "allow"),
    } <= decided  # fmt: skip
    log = consoles.live.gateways[0].log.read_text()
    for address in (*reader.seen, *operator.seen, *nobody.seen):
        for name, [value, *_] in parse_qs(urlsplit(address).query).items():
            if name in ("code", "state", "nonce", "code_challenge"):
                assert value not in log
    assert not [address for address in (*reader.seen, *operator.seen) if "token" in address]


async def test_an_answer_is_for_one_browser_and_once(consoles: Consoles, arrive: Callable[[], Visitor]) -> None:
    url = consoles.urls[0]
    victim, attacker = arrive(), arrive()
    stopped = await attacker.sign_in("operator-mallory", stop=f"{url}/console/callback")
    answer = stopped.headers["location"]
    assert answer.startswith(f"{url}/console/callback?")
    refused = await victim.go(answer)
    assert refused.status_code == 403, "another browser began this sign-in"
    assert "set-cookie" not in refused.headers
    await victim.go(f"{url}/console/start", stop="http")
    assert (await victim.go(answer)).status_code == 403, "it has another state"
    changed = answer.replace("code=", "code=x")
    assert (await attacker.go(changed)).status_code == 403
    assert (await attacker.go(answer)).status_code == 403, "the state was used up by the answer before"

    entered = await attacker.sign_in("operator-mallory", stop=f"{url}/console/callback")
    first = await attacker.go(entered.headers["location"])
    assert first.status_code == 200
    assert (await attacker.go(entered.headers["location"])).status_code == 403


async def test_what_is_asked_for(consoles: Consoles, provider: Provider, arrive: Callable[[], Visitor]) -> None:
    """PKCE, state, nonce, the exact redirect address; and of a sign-in for a change, a proof of presence."""
    person, url = arrive(), consoles.urls[0]
    sent = await person.go(f"{url}/console/start?back=https://evil.example/", stop=provider.url)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(sent.headers["location"]).query).items()}
    assert asked["redirect_uri"] == f"{url}/console/callback"
    assert (asked["response_type"], asked["code_challenge_method"], asked["scope"]) == ("code", "S256", "openid lacre:console")
    assert len({asked["state"], asked["nonce"], asked["code_challenge"]}) == 3
    again = await person.go(f"{url}/console/start?again", stop=provider.url)
    repeated = {name: values[0] for name, values in parse_qs(urlsplit(again.headers["location"]).query).items()}
    assert (repeated["prompt"], repeated["max_age"]) == ("login", "0")
    assert not {asked["state"], asked["nonce"]} & {repeated["state"], repeated["nonce"]}
    home = await person.sign_in("operator-olga", "/console/start?again&back=/console/workers")
    assert str(home.url) == f"{url}/console/workers"
    assert "Drain gateway" in home.text
