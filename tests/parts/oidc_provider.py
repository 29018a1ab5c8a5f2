"""A real OpenID provider as a process: `tests/oidc/provider.mjs`."""

from __future__ import annotations

import json
import selectors
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2

FOLDER = Path(__file__).resolve().parents[1] / "oidc"
NODE = shutil.which("node")
SECRET = "a secret of this test alone"


@dataclass
class Provider:
    """The provider of `provider.mjs` as a process. kids: of the keys in its set, the ones that it signs with first."""

    process: subprocess.Popen[str]
    kids: tuple[str, ...] = ()
    url: str = ""

    @classmethod
    def start(cls) -> Self:
        command = [str(NODE), "provider.mjs"]
        process = subprocess.Popen(
            command, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        provider = cls(process)
        provider._take()
        return provider

    def tell(self, command: str) -> None:
        """`rotate` or `retire`. When this returns it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        self._take()

    def _take(self) -> None:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and self.process.poll() is None:
                if selector.select(timeout=0.5) and (line := self.process.stdout.readline()).startswith("{"):
                    said = json.loads(line)
                    self.url, self.kids = f"http://127.0.0.1:{said['port']}", tuple(said["kids"])
                    return
        raise AssertionError("the provider says nothing")

    async def token(self, algorithm: str, proof: str | None = None) -> str:
        """A new access token (client credentials). proof: the `DPoP` header, for a token that is bound to its key."""
        form = {
            "grant_type": "client_credentials", "client_id": "app", "client_secret": SECRET,
            "resource": f"urn:lacre:{algorithm}", "scope": "lacre:http",
        }  # fmt: skip
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
            response = await client.post(f"{self.url}/token", data=form, headers={} if proof is None else {"dpop": proof})
        answer: dict[str, Any] = response.json()
        assert response.status_code == 200, answer
        return str(answer["access_token"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
