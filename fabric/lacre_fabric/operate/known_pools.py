"""Which pools a site has now. `lacre pool` changes `site.json` while `lacre up` or `lacre keys tend --stay` run."""

from __future__ import annotations

from dataclasses import replace

import structlog

from lacre.errors import SettingsError
from lacre_fabric.operate.site import Site

log = structlog.get_logger("lacre.site")


def current(site: Site) -> Site:
    """The site with the pools that its file names now, so that no manifest lacks a pool that came meanwhile.

    If the file is damaged, the pools stay as they were, because the manifest must be renewed.
    """
    if not (site.folder / "site.json").exists():
        return site
    try:
        return replace(site, pools=Site.load(site.folder).pools)
    except SettingsError as exc:
        log.warning("site.damaged", reason=str(exc), remedy="correct the file; until then the pools stay as they were")
        return site
