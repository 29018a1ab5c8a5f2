"""A long-lived process sees the pools that another command adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lacre_fabric.operate import known_pools
from lacre_fabric.operate.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path, {"default": ("small",)}, replicas=3)
    site.save("nats://nats.invalid:4222", "https://lacre.example")
    return site


def test_a_pool_that_comes_is_seen(site: Site) -> None:
    replace(site, pools={"default": ("small",), "legal": ("large",)}).save("nats://nats.invalid:4222", "https://lacre.example")
    seen = known_pools.current(site)
    assert {pool: list(models) for pool, models in seen.pools.items()} == {"default": ["small"], "legal": ["large"]}
    assert seen.replicas == 3


@pytest.mark.parametrize("content", ["", "{", '{"pools": 3}', '{"pools": {"../x": []}}'])
def test_a_damaged_file_changes_no_pool(site: Site, content: str) -> None:
    """Its manifest must still be renewed."""
    (site.folder / "site.json").write_text(content)
    assert known_pools.current(site) == site


def test_a_site_that_was_never_saved(tmp_path: Path) -> None:
    site = Site(tmp_path, {"default": ("small",)})
    assert known_pools.current(site) == site
