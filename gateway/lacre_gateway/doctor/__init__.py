"""`lacre doctor`: looks at everything that a gateway needs before it can serve, and says what to do about what is wrong.

Rules:
- It changes nothing, takes no work and no answer, and can run beside the gateway that it looks after.
- Each check tells one thing, and its remedy; what cannot be looked at because something else is wrong is `skipped`.

Open `host.py` first for the shape of a check; `findings.py` says what one returns.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from lacre.errors import SettingsError
from lacre_gateway.doctor import fabric, host, trust
from lacre_gateway.doctor.findings import Finding, Findings, State
from lacre_gateway.settings import GatewaySettings, load

__all__ = ["Finding", "State", "examine"]


def examine(file: Path) -> list[Finding]:
    """file: the settings file. Never raises for what is wrong with it or with what it names."""
    findings = Findings()
    try:
        settings = load(file)
    except SettingsError as exc:
        findings.failed("settings", str(exc), "correct the file; docs/settings.md lists the keys")
        findings.skipped("everything else", "the settings are needed first")
        return findings.found
    findings.ok("settings", f"{file}: gateway {settings.gateway}, {settings.processes} process(es)")
    host.check(settings, findings)
    trust.check(settings, findings)
    asyncio.run(_outside(settings, findings))
    return findings.found


async def _outside(settings: GatewaySettings, findings: Findings) -> None:
    await trust.check_issuers(settings, findings)
    await fabric.check(settings, findings)
