"""The benchmarks run, and write what those who read them look for. How fast is for `make bench`, on a machine that is idle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "seal": {"mib_ratio", "xwing_request_ms", "x25519_request_ms", "record_seal_us", "record_open_us"},
    "imports": {"added_ms"},
    "gateway": {
        "rps_c16_1k",
        "cpu_us_per_request",
        "records_per_s_c16",
        "p50_c1_1k_ms",
        "p99_c16_1k_ms",
        "p50_c1_1m_ms",
        "rss_mb",
    },
}
PEERS = {"nginx_rps_c16", "portkey_rps_c16", "portkey_cpu_us_per_request"}  # where they can be had


@pytest.mark.parametrize("name", ["seal", "imports", pytest.param("gateway", marks=pytest.mark.slow)])
def test_quick(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", f"bench.{name}", "--quick", "--json", tmp_path / "out"], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "out").read_text())
    assert KEYS[name] <= set(figures)
    assert name != "gateway" or shutil.which("npm") is None or set(figures) >= PEERS
    assert all(isinstance(value, float) for value in figures.values())
