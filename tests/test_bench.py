"""The benchmarks run, and write what those who read them look for. How fast is for `make bench`, on a machine that is idle."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench import consumer
from bench.load import Task, requests
from bench.queueing import erlang_c, mean_wait, wanted
from bench.stand import MODELS, REOPEN, SUBJECTS, sizes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.receipts import TYP
from lacre.jose import jws

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "seal": {"mib_ratio", "xwing_request_ms", "x25519_request_ms", "record_seal_us", "record_open_us"},
    "imports": {"added_ms"},
    "gateway": {"rps_c16_1k", "cpu_us_per_request", "records_per_s_c16", "p50_c1_1k_ms", "p99_c16_1k_ms", "p50_c1_1m_ms",
                "rss_mb", "xwing_cpu_us_per_request"},
    "flood": {"quiet_first_p50_ms", "flood_first_p50_ms", "first_ratio", "flood_rss_mb", "allowed_rss_mb", "flood_cpu_idle"},
    "scale": {"cpu_spread", "scaled_after_s", "kv_updates_per_s"} | {
        name.format(count) for count in (1, 4, 16, 64)
        for name in ("cpu_us_per_request_w{}", "busy_w{}", "wait_w{}_ms", "expected_w{}_ms")
    },
}  # fmt: skip
KEYS["records"] = {"python_records_per_s"}
if shutil.which("npm") is not None:
    KEYS["records"] |= {"node_records_per_s", "node_of_python"}
    if shutil.which("chromium") is not None:
        KEYS["records"] |= {"chromium_records_per_s", "chromium_of_python"}
SLOW = ("gateway", "flood", "scale", "records")
PEERS = {"nginx_rps_c16", "portkey_rps_c16", "portkey_cpu_us_per_request"}  # where they can be had


@pytest.mark.parametrize(
    "name",
    ["seal", "imports", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gateway", "flood", "scale", "records"))],
)
def test_quick(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--json", tmp_path / "out"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")}, check=True)
    figures = json.loads((tmp_path / "out").read_text())
    assert KEYS[name] <= set(figures)
    assert name != "gateway" or shutil.which("npm") is None or set(figures) >= PEERS
    assert all(isinstance(value, float) for value in figures.values())


@pytest.mark.slow
def test_an_audit_log_is_verified_under_load(tmp_path: Path) -> None:
    """docs/audit.md has the figures of a million entries. The first verdict that is not due ends it with an error."""
    command = [sys.executable, "-m", "bench.audit_load", "--entries", "10000", "--json", tmp_path / "out"]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.count("does not hold: ") == 6
    figures = json.loads((tmp_path / "out").read_text())
    assert figures["entries"] >= 10_000
    assert figures["requests_meanwhile"] > 0


def test_what_queueing_theory_expects() -> None:
    assert erlang_c(1, 0.8) == pytest.approx(0.8)  # at one slot it is the load
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)  # as published tables have it
    assert mean_wait(1, 8.0, 0.1, 1.0) == pytest.approx(0.4)  # M/M/1: load · service / (1 − load)
    assert mean_wait(1, 8.0, 0.1, 0.0) == pytest.approx(0.2)  # M/D/1: half of it
    assert mean_wait(4, 40.0, 0.1, 1.0) == float("inf")
    assert [wanted(demand, 1, 0.8) for demand in (0, 4, 8.1)] == [1, 5, 11] and wanted(33, 16, 0.8) == 3


def test_receipts_take_the_path_of_a_worker_s() -> None:
    """A header in another spelling would be verified by a slower path."""
    assert jws.sign({}, Ed25519PrivateKey.generate(), TYP).startswith(f"{consumer.HEAD}.")


@pytest.mark.parametrize("nominal", [2**10, 2**14, 2**18, 2**20])
def test_no_cache_sees_one_key_for_ever(nominal: int) -> None:
    found = sizes(nominal)
    assert len(set(found)) == len(found)
    assert sum(found) / len(found) == pytest.approx(nominal, abs=1)
    assert math.gcd(len(found), SUBJECTS) == math.gcd(len(found), len(MODELS)) == math.gcd(SUBJECTS, len(MODELS)) == 1


def test_every_tenth_request_ends_its_connection() -> None:
    heads = ["POST / HTTP/1.1\r\n", "POST /x HTTP/1.1\r\n"]
    bodies = [(base64.b64encode(bytes(size)).decode(), "") for size in (1, 2, 3)]
    made = list(itertools.islice(requests(Task(1, 1, heads, bodies, fresh=4, reopen=REOPEN)), 60))
    assert [last for _, last in made] == ([False] * 9 + [True]) * 6
    assert all((b"connection: close" in request) is last for request, last in made)
    lengths = {int(request.partition(b"length: ")[2].partition(b"\r")[0]) for request, _ in made}
    assert lengths == {5, 6, 7}
    assert all(len(request.partition(b"\r\n\r\n")[2]) in lengths for request, _ in made)
    assert len({(request.partition(b"\r")[0], len(request.partition(b"\r\n\r\n")[2])) for request, _ in made}) == 6
