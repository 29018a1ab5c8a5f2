"""Puts the tree's version into the requirements of both distributions, so that it is written once, in `lacre/_version.py`.

The build of `lacre` and that of `lacre-server` both use this file. Each gives the requirements as configuration of the hook,
with `{version}` in the place of the version. A source distribution holds the result, so building from one does not come here.
"""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Fills in `dependencies` (a list) and `optional-dependencies` (lists by extra), whichever the hook's configuration has."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the `[project]` table, which has the version by now."""
        version = metadata["version"]
        if "dependencies" in self.config:
            metadata["dependencies"] = _filled(self.config["dependencies"], version)
        if "optional-dependencies" in self.config:
            extras = self.config["optional-dependencies"]
            metadata["optional-dependencies"] = {extra: _filled(extras[extra], version) for extra in extras}


def _filled(requirements: list[str], version: str) -> list[str]:
    return [requirement.replace("{version}", version) for requirement in requirements]
