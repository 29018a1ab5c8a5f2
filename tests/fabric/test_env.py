"""The file that a shell sources: the token in it is renewed while `lacre up` runs."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from pathlib import Path

import jwt

from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.up import ENV_RENEWAL, keep_env
from parts.up import read_env


async def test_renewed(tmp_path: Path) -> None:
    site = Site(tmp_path / "state", {"default": ("m",)})
    site.create()
    url = "http://127.0.0.1:8321"
    path = site.write_env(url)
    connection_string, first = read_env(site.folder)
    keeping = asyncio.create_task(keep_env(site, url, every=0.01))
    async with asyncio.timeout(20):
        while read_env(site.folder)[1] == first:
            await asyncio.sleep(0.01)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    again, second = read_env(site.folder)
    assert again == connection_string
    claims = [jwt.decode(token, options={"verify_signature": False}) for token in (first, second)]
    assert claims[0]["jti"] != claims[1]["jti"]
    assert claims[1]["exp"] >= claims[0]["exp"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ENV_RENEWAL < dev_issuer.LIFETIME / 2  # what was sourced just before the renewal is good for a while yet
