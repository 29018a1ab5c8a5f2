"""The benchmarks run, and write what those who read them look for. How fast is for `make bench`, on a machine that is idle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.queueing import erlang_c, mean_wait, wanted

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "seal": {"mib_ratio", "xwing_request_ms", "x25519_request_ms", "record_seal_us", "record_open_us"},
    "imports": {"added_ms"},
    "gateway": {"rps_c16_1k", "cpu_us_per_request", "records_per_s_c16", "p50_c1_1k_ms", "p99_c16_1k_ms", "p50_c1_1m_ms",
                "rss_mb"},
    "flood": {"quiet_first_p50_ms", "flood_first_p50_ms", "first_ratio", "flood_rss_mb", "allowed_rss_mb", "flood_cpu_idle"},
    "scale": {"cpu_spread", "scaled_after_s", "kv_updates_per_s"} | {
        name.format(count) for count in (1, 4, 16, 64)
        for name in ("cpu_us_per_request_w{}", "busy_w{}", "wait_w{}_ms", "expected_w{}_ms")
    },
}  # fmt: skip
PEERS = {"nginx_rps_c16", "portkey_rps_c16", "portkey_cpu_us_per_request"}  # where they can be had


@pytest.mark.parametrize(
    "name", ["seal", "imports", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gateway", "flood", "scale"))]
)
def test_quick(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", f"bench.{name}", "--quick", "--json", tmp_path / "out"], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "out").read_text())
    assert KEYS[name] <= set(figures)
    assert name != "gateway" or shutil.which("npm") is None or set(figures) >= PEERS
    assert all(isinstance(value, float) for value in figures.values())


def test_what_queueing_theory_expects() -> None:
    assert erlang_c(1, 0.8) == pytest.approx(0.8)  # at one slot it is the load
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)  # as published tables have it
    assert mean_wait(1, 8.0, 0.1, 1.0) == pytest.approx(0.4)  # M/M/1: load · service / (1 − load)
    assert mean_wait(1, 8.0, 0.1, 0.0) == pytest.approx(0.2)  # M/D/1: half of it
    assert mean_wait(4, 40.0, 0.1, 1.0) == float("inf")
    assert [wanted(demand, 1, 0.8) for demand in (0, 4, 8.1)] == [1, 5, 11] and wanted(33, 16, 0.8) == 3
