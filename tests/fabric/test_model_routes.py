"""Routes in a state folder: checked whole, repeated in each manifest, and no reason why one could not be signed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre.trust.chain import verify
from lacre.trust.routes import MAX_ROUTES, MAX_TARGETS, ModelRoute, RouteTarget
from lacre_fabric.operate import model_routes, pools
from lacre_fabric.operate.account_reload import AccountFiles
from lacre_fabric.operate.site import Site

GOOD = """
[routes.assistant]
pools = [{ pool = "default", model = "small", share = 95 }, { pool = "canary", model = "new", share = 5 }]

[routes."small"]
sticky = false
pools = [{ pool = "default" }, { pool = "canary", model = "new" }]
"""
ROUTES = {
    "assistant": ModelRoute((RouteTarget("default", "small", 95), RouteTarget("canary", "new", 5))),
    "small": ModelRoute((RouteTarget("default", "small", 0), RouteTarget("canary", "new", 0)), sticky=False),
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small",), "canary": ("new",)})
    site.create()
    return site


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "routes.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def published(site: Site) -> Mapping[str, ModelRoute]:
    return verify(site.sign_manifest(), site.root, time.time()).manifest.routes


def test_each_manifest_has_them_until_others_come(site: Site, tmp_path: Path) -> None:
    assert published(site) == {}
    routes = model_routes.read(written(tmp_path, "\ufeff" + GOOD), site.pools)
    assert routes == ROUTES
    for _ in range(2):
        model_routes.record(site.folder, routes)
        assert published(site) == ROUTES == published(Site(site.folder, site.pools))
    assert (site.folder / "trust" / "routes.json").stat().st_mode & 0o777 == 0o600
    model_routes.record(site.folder, model_routes.read(written(tmp_path, "[routes]"), site.pools))
    assert published(site) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[routes", "not TOML"), ("", r"only \[routes\] to remove"), ("# nothing", "has no routes"), ("\0", "not TOML"),
        ('[routes.small]\npools = [{ pool = "default", share = 9223372036854775808 }]', "most"),
        ('[routes.small]\npools = [{ pool = "default", share = true }]', "integer"),
        ('[routes.small]\npools = [{ pool = "default", share = nan }]', "integer"),
        ('[routes.small]\npools = [{ pool = "default" }]\n[routes.small]\npools = []', "not TOML"),
        ("[[routes.a.pools]]\npool = 'default'\nmodel = 'b'\n[[routes.b.pools]]\npool = 'default'\nmodel = 'a'", "model 'b'"),
        ('[[routes]]\nname = "a"', "object"), ('[[pools]]\nname = "a"', "unknown pools"),
        ('[routes.small]\nsticky = "yes"\npools = [{ pool = "default" }]', "sticky"),
        (b"\xff", "UTF-8"), ("[route.a]", "unknown route"), ("routes = 1", "object"),
        ("routes.a = 1", "object"), ("[routes.a]", "pools"), ("[routes.a]\npools = []", "1 to 8"),
        ("[routes.a]\npool = []", "unknown pool"), ("[routes.a]\npools = [1]", "object"),
        ('[routes.a]\npools = [{ pool = "default", shares = 1 }]', "unknown shares: a pool has model, pool, share"),
        ('[routes.a]\npools = [{ pool = "no" }]', "no pool 'no': there are default, canary"),
        ('[routes.a]\npools = [{ pool = "default" }]', "no model 'a': it has small"),
        ('[routes."a b"]\npools = [{ pool = "default", model = "small" }]', "visible"),
        ('[routes.small]\npools = [{ pool = "default", share = -1 }]', "negative"),
        ('[routes.small]\npools = [{ pool = "default", share = 5.0 }]', "integer"),
        ('[routes.small]\npools = [{ pool = "default" }, { pool = "default" }]', "once"),
        ("a = " + "[" * 5000, "not TOML"), ("#" + "x" * 2**20, "bytes"),
    ],
)  # fmt: skip
def test_a_wrong_file_says_what_is_wrong(site: Site, tmp_path: Path, text: str | bytes, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError, match=told) as caught:
        model_routes.read(path, site.pools)
    assert str(path) in str(caught.value)


def test_no_file_and_too_much_in_one(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        model_routes.read(tmp_path / "none.toml", site.pools)
    pools = {"default": [f"m{number}" for number in range(MAX_TARGETS)]}
    targets = ", ".join(f'{{ pool = "default", model = "{model}" }}' for model in pools["default"])
    many = "".join(f"[routes.{'n' * 120}{number}]\npools = [{targets}]\n" for number in range(MAX_ROUTES))
    with pytest.raises(SettingsError, match="write fewer"):
        model_routes.read(written(tmp_path, many), pools)


def test_the_most_routes_can_be_signed(site: Site, tmp_path: Path) -> None:
    """The limit of a file leaves room for pools and keys."""
    target = '{ pool = "default", model = "small" }'
    many = "".join(f"[routes.{'n' * 80}{number}]\npools = [{target}]\n" for number in range(MAX_ROUTES))
    model_routes.record(site.folder, model_routes.read(written(tmp_path, many), site.pools))
    assert len(published(site)) == MAX_ROUTES


def test_what_left_the_state_leaves_the_routes(site: Site) -> None:
    model_routes.record(site.folder, ROUTES)
    only = Site(site.folder, {"default": ("small",)})
    assert published(only) == {name: replace(route, targets=route.targets[:1]) for name, route in ROUTES.items()}
    assert published(Site(site.folder, {"default": ("other",)})) == {}
    assert published(site) == ROUTES, "nothing was forgotten"


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"routes": {"a": {"pools": []}}}', b'{"routes": []}', b""])
def test_a_damaged_file_stops_no_manifest(site: Site, content: bytes) -> None:
    path = site.folder / "trust" / "routes.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="publish the routes again"):
        published(site)
    model_routes.record(site.folder, ROUTES)
    assert published(site) == ROUTES
    path.write_bytes(content)
    assert published(site) == ROUTES, "those of the last manifest"
    assert path.read_bytes() == content


async def test_a_pool_that_routes_need_is_not_removed(site: Site, tmp_path: Path) -> None:
    """Neither on a running site nor offline; nothing is changed before."""
    (site.folder / "site.json").write_text(
        json.dumps({"pools": site.pools, "nats": {"url": ["nats://nats.example:4222"]}, "gateway": "https://x.example"})
    )
    model_routes.record(site.folder, ROUTES | {"next": ModelRoute((RouteTarget("canary", "new", 1),))})
    files = AccountFiles((tmp_path / "accounts.json",))
    for removing in (pools.remove, pools.withdraw):
        with pytest.raises(pools.PoolInUse, match="lead nowhere: next; publish others"):
            await removing(site, "canary", files)
    assert set(Site.load(site.folder).pools) == set(site.pools) and site.receipt_file("canary").exists()
    await pools.withdraw(site, "canary", files, force=True)
    assert "canary" not in Site.load(site.folder).pools
    assert model_routes.without(site.folder, {"default": ["small"]}) == ["next"]
