"""Which names a new pool may have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from lacre.errors import SettingsError
from lacre_fabric.nats import subjects

# A pool's name plus one of these names something else: a Secret in Kubernetes, the credential of `lacre up`'s own worker.
_TAKEN: Final = {"-keys": "the Secret with its keys", "-n1": "a worker's credential"}
_CHART: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")


def check_new(pool: str, others: Iterable[str]) -> None:
    """Raises SettingsError for a name that no pool may have, or not beside these others."""
    subjects.check_name("pool", pool)
    for other in others:
        for suffix, what in _TAKEN.items():
            if pool == other + suffix or other == pool + suffix:
                first = min(pool, other, key=len)
                raise SettingsError(
                    f"{pool} and {other} cannot be pools together: {first}{suffix} is {what}; choose another name"
                )


def check_for_chart(pool: str) -> None:
    """Raises SettingsError. The name becomes part of names in Kubernetes, which are short and have no `_`."""
    if not _CHART.fullmatch(pool):
        raise SettingsError(
            f"{pool!r} cannot be a pool in the Helm chart: use 1 to 20 of a-z, 0-9 and -, with a letter or digit at both ends"
        )
