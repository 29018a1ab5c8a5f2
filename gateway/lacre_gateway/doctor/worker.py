"""`lacre doctor --worker`: asks `lacre worker check`, which belongs to another package, and reports its answer in our form."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lacre.runtime.json_objects import object_in
from lacre_fabric.operate.leash import PYTHON
from lacre_gateway.doctor.findings import Finding, Findings

_LIMIT: Final = 600.0  # seconds: it reads whole model files to check their digests
_MISSING: Final = "No such command 'worker'"


def examine_workers(files: Sequence[Path]) -> list[Finding]:
    """files: the settings files of workers. Never raises for a fault in them."""
    findings = Findings()
    if not files:
        findings.skipped("worker", "this state folder has no worker: name its settings file with --settings")
    for file in files:
        _examine(file, file.parent.name if len(files) > 1 else "", findings)
    return findings.found


def _examine(file: Path, name: str, findings: Findings) -> None:
    """name: tells several workers apart."""
    command = [*PYTHON, "-m", "lacre", "worker", "check", "--json", "--settings", str(file)]
    place = f"worker {name}".strip()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        findings.failed(place, f"the check took longer than {_LIMIT:.0f} s", "check the disk with the model files")
        return
    told = object_in(done.stdout.encode())
    if told is None:
        why = "workers are not installed here" if _MISSING in done.stderr else done.stderr.strip() or "no answer"
        findings.failed(place, why, "run it on the worker's machine, with lacre[worker] installed")
        return
    reasons = told.get("reasons")
    for reason in reasons if isinstance(reasons, list) else ():
        said = {name: str(value) for name, value in reason.items()} if isinstance(reason, dict) else {}
        findings.failed(f"{place} {said.get('kind', '')}".strip(), said.get("detail", ""), said.get("remedy", ""))
    if told.get("ok") is True:
        findings.ok(place, f"{file}: this worker can serve")
