"""`lacre doctor`: checks everything that a gateway needs before it can serve, and says how to fix each fault.

Rules:
- It changes nothing, takes no work and no answer, and can run beside the gateway that it checks.
- Each check reports one fact and its remedy; a check that needs something that failed is `skipped`.

Open `host.py` first for the shape of a check; `findings.py` defines a check's result.
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
    """file: the settings file. Never raises for a fault in it or in the files that it names."""
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
