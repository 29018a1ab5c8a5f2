"""An operator at the console of a running gateway, by HTTP without a browser: signs in by a link, reads and sends forms."""

from __future__ import annotations

import re
from typing import Any

import httpx2

from parts.console_site import Consoles


class Operator:
    """url: of the console. token: an administrator's."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self.http = httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30)

    @classmethod
    def of(cls, consoles: Consoles, number: int = 0) -> Operator:
        """At the console of one of the gateways. It ends with the deployment."""
        operator = cls(consoles.urls[number], consoles.live.token("root", scopes=["lacre:admin"]))
        consoles.live.stack.push_async_callback(operator.http.aclose)
        return operator

    async def sign_in(self) -> None:
        made = await self.http.post("/v1/console/links", headers={"authorization": f"Bearer {self.token}"})
        code = made.json()["url"].rpartition("code=")[2]
        entered = await self.http.post("/console/open", data={"code": code}, headers={"origin": self.url})
        assert entered.status_code == 303, entered.text

    async def order(self, what: str, node: str) -> None:
        """By the form that the page shows."""
        page = (await self.http.get("/console/workers")).text
        forms = re.findall(r'<form method="post" action="(/console/workers/[a-z]+)".*?</form>', page, re.DOTALL)
        assert f"/console/workers/{what}" in forms, page
        csrf = re.search('name="csrf" value="([^"]+)"', page)
        assert csrf is not None
        fields = {"csrf": csrf[1], "pool": "default", "region": "lacre", "node": node}
        done = await self.http.post(f"/console/workers/{what}", data=fields, headers={"origin": self.url})
        assert done.status_code == 303, done.text

    async def read(self, path: str) -> bytes:
        """A page, or what the API answers."""
        token = {} if path.startswith("/console") else {"authorization": f"Bearer {self.token}"}
        answer = await self.http.get(path, headers=token)
        assert answer.status_code == 200, (path, answer.text)
        return answer.content

    async def workers(self) -> dict[str, Any]:
        """By name, as the API tells."""
        told = await self.http.get("/v1/workers", headers={"authorization": f"Bearer {self.token}"})
        return {one["node"]: one for one in told.json()["workers"]}
