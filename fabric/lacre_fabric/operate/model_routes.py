"""The routes that each manifest repeats: `trust/routes.json` of a state folder, from a file that an operator writes.

    [routes.assistant]
    sticky = true
    pools = [{ pool = "default", model = "smollm2-135m", share = 95 }, { pool = "canary", model = "smollm2-360m", share = 5 }]

Rules:
- A file is checked whole before any of it counts, against the limits of the manifest and the pools of the state folder.
- A file replaces all routes that there were before. The table `[routes]` alone removes them. An empty file is refused: it may
  be a half-written one.
- A pool or model that leaves the state folder also leaves the routes of the next manifest.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from lacre.cli.surroundings import read_file, utf8
from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.jose.claims import Members
from lacre.trust.chain import verify
from lacre.trust.routes import ModelRoute, routes_of
from lacre_fabric.keys.secret_files import write_secret

# Of all routes in a manifest, whose token may have 512 KiB: a file that could not be signed must not stop later manifests.
MAX_ENCODED: Final = 2**16
_KNOWN: Final = {"route": frozenset({"pools", "sticky"}), "pool": frozenset({"pool", "model", "share"})}

Routes = Mapping[str, ModelRoute]  # by name
Served = Mapping[str, Sequence[str]]  # the models of each pool

log = structlog.get_logger("lacre.routes")


def read(path: Path, pools: Served) -> Routes:
    """The routes of an operator's file. Raises SettingsError."""
    try:
        said = tomllib.loads(utf8(read_file(path), str(path)).removeprefix("\ufeff"))
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise SettingsError(f"{path}: not TOML: {exc}") from exc
    if unknown := set(said) - {"routes"}:
        raise SettingsError(f"{path}: unknown {', '.join(sorted(unknown))}: write each route as [routes.NAME]")
    if "routes" not in said:
        raise SettingsError(
            f"{path}: it has no routes: write each one as [routes.NAME], or only [routes] to remove all of them"
        )
    _check_words(path, said["routes"])
    try:
        routes = routes_of(Members(said, "the file").named_objects("routes"))
    except InvalidMessage as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    if (size := len(_encoded(routes))) > MAX_ENCODED:
        raise SettingsError(f"{path}: its routes have {size} bytes in the manifest, and may have {MAX_ENCODED}: write fewer")
    for name, route in routes.items():
        for target in route.targets:
            if target.pool not in pools:
                raise SettingsError(f"{path}: route {name!r}: no pool {target.pool!r}: there are {_listed(pools)}")
            if target.model not in pools[target.pool]:
                served = _listed(pools[target.pool])
                raise SettingsError(
                    f"{path}: route {name!r}: pool {target.pool!r} has no model {target.model!r}: it has {served}"
                )
    return routes


def record(folder: Path, routes: Routes) -> None:
    """Puts them in place of those before. folder: of the state."""
    write_secret(_file(folder), _encoded(routes))


def signed(folder: Path, pools: Served, root: bytes, now: float) -> Routes:
    """The routes for the next manifest. If the file is damaged, those of the last one: see `Site._pool_or_last`.

    folder: of the state. root: the first one. now: seconds since the epoch. Raises SettingsError if there is no last manifest.
    """
    try:
        found = _recorded(_file(folder))
    except SettingsError as exc:
        try:
            found = verify((folder / "trust" / "manifest.json").read_bytes(), root, now).manifest.routes
        except (OSError, LacreError):
            raise exc from None
        log.error("routes.damaged", reason=str(exc), remedy="the last routes are published; repair them within a day")
    left = {name: _left(name, route, pools) for name, route in found.items()}
    return {name: route for name, route in left.items() if route.targets}


def without(folder: Path, pools: Served) -> Sequence[str]:
    """The names of the routes that lead to none of these pools. Those of a damaged file are not known. folder: of the state."""
    with suppress(SettingsError):
        found = _recorded(_file(folder)).items()
        return [
            name for name, route in found if not any(target.model in pools.get(target.pool, ()) for target in route.targets)
        ]
    return []


def _encoded(routes: Routes) -> bytes:
    return json.dumps({"routes": {name: route.members() for name, route in routes.items()}}).encode()


def _recorded(path: Path) -> Routes:
    """Empty if there is no file. Raises SettingsError for a damaged one."""
    try:
        return routes_of(Members.parse(path.read_bytes(), "it").named_objects("routes"))
    except FileNotFoundError:
        return {}
    except (OSError, InvalidMessage) as exc:
        raise SettingsError(
            f"{path} is damaged ({exc}): publish the routes again with `lacre manifest publish --routes`"
        ) from exc


def _left(name: str, route: ModelRoute, pools: Served) -> ModelRoute:
    there = tuple(target for target in route.targets if target.model in pools.get(target.pool, ()))
    for target in route.targets:
        if target not in there:
            log.error("route.target_gone", route=name, pool=target.pool, model=target.model)
    return replace(route, targets=there)


def _file(folder: Path) -> Path:
    return folder / "trust" / "routes.json"


def _check_words(path: Path, routes: object) -> None:
    """A misspelt word would silently change a share. Raises SettingsError."""
    for name, route in routes.items() if isinstance(routes, dict) else ():
        pools = route.get("pools") if isinstance(route, dict) else None
        for kind, table in (("route", route), *(("pool", pool) for pool in (pools if isinstance(pools, list) else ()))):
            if isinstance(table, dict) and (unknown := set(table) - _KNOWN[kind]):
                known = _listed(sorted(_KNOWN[kind]))
                raise SettingsError(f"{path}: route {name!r}: unknown {_listed(sorted(unknown))}: a {kind} has {known}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
