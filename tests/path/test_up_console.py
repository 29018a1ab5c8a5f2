"""The operators' console after `lacre up`: the commands that it prints, as a person types them."""

from __future__ import annotations

import re
import tomllib

import httpx2

from parts.up import Up, run


def test_it_opens(up: Up) -> None:
    settings = tomllib.loads((up.state / "gateway" / "gateway.toml").read_text())
    url = settings["console"]["url"]
    assert settings["admin"]["port"] == int(url.rpartition(":")[2])
    assert "origins" not in settings["listen"], "no page of another origin may ask this gateway"
    printed = " ".join(up.said())
    assert f"lacre admin open --token-file token --state {up.state}" in printed
    token = up.state / "admin-token"
    token.write_text(up.command("token", "issue", "root", "--scope", "lacre:admin"))
    link = up.command("admin", "open", "--token-file", str(token))
    assert link.startswith(f"{url}/console/open?code=")
    with httpx2.Client(base_url=url, trust_env=False) as browser:
        assert "root of" in browser.get(link).text
        code = link.rpartition("code=")[2]
        entered = browser.post("/console/open", data={"code": code}, headers={"origin": url})
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/")
        workers = browser.get("/console/workers").text
        assert re.search(r"<code>n1</code>", workers)
        assert 'action="/console/workers/drain"' in workers
    refused = run("admin", "open", "--state", str(up.state), up=up)
    assert refused.returncode == 3, "the developer's token opens nothing"
