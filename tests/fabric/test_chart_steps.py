"""What the commands that `lacre pool` prints for a cluster do on the operator's machine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.operate import chart_pools, pools
from lacre_fabric.operate.account_reload import AccountFiles
from lacre_fabric.operate.site import Site

FILES = AccountFiles()
Steps = Callable[[Site, str, Path], list[str]]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small",), "legal": ("large",)})
    site.create()
    site.save("tls://lacre-nats.lacre.svc:4222", "https://lacre.example.com")
    site.replicated_roles()  # makes the credentials
    return site


def run(step: str) -> None:
    subprocess.run(["sh", "-c", f"umask 022; {step}"], check=True)


@pytest.mark.parametrize("command", [chart_pools.added, chart_pools.removed])
def test_nobody_else_can_read_the_archive_of_the_keys(site: Site, command: Steps) -> None:
    steps = command(site, "legal", site.folder / "accounts.json")
    archive = site.folder / "state.tar"
    archive.touch(0o644)  # as an older command left it
    [place] = [place for place, step in enumerate(steps) if "tar -cf" in step]
    run(steps[place])
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as opened:
        assert {"signer.pem", "pools/legal/receipt.pem"} <= set(opened.getnames())
    assert "create secret generic lacre-signer" in steps[place + 1]
    run(steps[place + 2])
    assert not archive.exists()


def test_a_removal_goes_on_whichever_file_could_not_be_written(site: Site) -> None:
    chart = site.folder / "chart"
    chart.touch()  # where a folder should be
    with pytest.raises(OSError, match="chart"):
        asyncio.run(pools.withdraw(site, "legal", FILES))
    chart.unlink()
    asyncio.run(pools.withdraw(Site.load(site.folder), "legal", FILES))
    assert set(json.loads(chart_pools.values_file(site).read_text())["pools"]) == {"default"}
    assert not site.receipt_file("legal").exists()


def test_the_steps_of_a_removal_can_be_had_again(site: Site) -> None:
    asyncio.run(pools.withdraw(site, "legal", FILES))
    gone = asyncio.run(pools.withdraw(Site.load(site.folder), "legal", FILES))
    assert set(gone.pools) == {"default"}
    for name in ("lega1", "default/keys", ".."):
        with pytest.raises(SettingsError):
            asyncio.run(pools.withdraw(Site.load(site.folder), name, FILES))
