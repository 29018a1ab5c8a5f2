"""The benchmarks run, and write what those who read them look for. How fast is for `make bench`, on a machine that is idle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "seal": {"mib_ratio", "xwing_request_ms", "x25519_request_ms", "record_seal_us", "record_open_us"},
    "imports": {"added_ms"},
}


@pytest.mark.parametrize("name", KEYS)
def test_quick(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", f"bench.{name}", "--quick", "--json", tmp_path / "out"], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "out").read_text())
    assert KEYS[name] <= set(figures)
    assert all(isinstance(value, float) for value in figures.values())
