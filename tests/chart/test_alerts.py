"""The alert rules: promtool reads them, each fires for its fault and for nothing else, and they name what is really counted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.metrics import counted, named_in
from chart.rendering import CHART, ROOT, render
from chart.test_rendering import validated

pytestmark = pytest.mark.slow
PROMTOOL = shutil.which("promtool")
RULES = CHART / "files" / "alerts.yaml"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}
MINUTES = 60  # of each series
G1, G2 = 'instance="g1",namespace="sealed"', 'instance="g2",namespace="sealed"'
POOL = 'pool="default",region="lacre"'
ENDLESS = 10**6  # seconds from the start of a test


def steady(value: float) -> str:
    return f"{value}x{MINUTES}"


def rising(each: float) -> str:
    """By so much a minute."""
    return f"0+{each}x{MINUTES}"


def histogram(name: str, labels: str, at: str, per_minute: float = 60) -> dict[str, str]:
    """Every observation in the bucket `at`."""
    bounds = ("0.05", "0.5", "1.0", "30.0", "60.0", "+Inf")
    rates = [per_minute if bounds.index(at) <= i else 0 for i in range(len(bounds))]
    return {f'{name}_bucket{{{labels},le="{le}"}}': rising(rate) for le, rate in zip(bounds, rates, strict=True)}


def healthy() -> dict[str, str]:
    """Two gateways, a pool in two regions of which one is empty, a few callers' mistakes."""
    found: dict[str, str] = {}
    for gateway in (G1, G2):
        one = {
            "lacre_build_info": 1, "lacre_ready": 1, "lacre_draining": 0, "lacre_fabric_connected": 1,
            "lacre_audit_writable": 1, "lacre_rules_refused": 0, "lacre_manifest_expiry_timestamp_seconds": ENDLESS,
        }  # fmt: skip
        found |= {f"{name}{{{gateway}}}": steady(value) for name, value in one.items()}
        for name in ("lacre_manifests_ignored_total", "lacre_audit_commit_failures_total"):
            found[f"{name}{{{gateway}}}"] = rising(0)
        found[f'lacre_requests_total{{{gateway},outcome="answered",problem="none"}}'] = rising(60)
        found[f'lacre_requests_total{{{gateway},outcome="refused",problem="forbidden"}}'] = rising(30)
        found[f'lacre_requests_total{{{gateway},outcome="client-gone",problem="none"}}'] = rising(30)
        found[f'lacre_settlements_total{{{gateway},result="receipted"}}'] = rising(60)
        found |= histogram("lacre_request_first_byte_seconds", gateway, "1.0")
        found |= histogram("lacre_audit_commit_seconds", gateway, "0.05")
        found[f"lacre_workers{{{gateway},{POOL}}}"] = steady(2)
        found[f'lacre_workers{{{gateway},pool="default",region="eu"}}'] = steady(0)
        for name in ("lacre_pool_away", "lacre_queue_missing"):
            found[f'{name}{{{gateway},pool="default"}}'] = steady(0)
        found[f"lacre_queue_requests{{{gateway},{POOL}}}"] = steady(3)
        for state, count in (("busy", 8), ("free", 1)):
            found[f'lacre_worker_slots{{{gateway},{POOL},state="{state}"}}'] = steady(count)
    return found


def everywhere(name: str, values: str, more: str = "") -> dict[str, str]:
    return {f"{name}{{{gateway}{more}}}": values for gateway in (G1, G2)}


# Of each alert: series in place of the healthy ones, and the minutes at which it is silent still, and fires.
FAULTS: Mapping[str, tuple[dict[str, str], int, int]] = {
    "LacreNoGateway": (everywhere("lacre_build_info", "_x60"), 4, 6),
    "LacreGatewayNotReady": ({f"lacre_ready{{{G1}}}": steady(0)}, 1, 3),
    "LacreFabricLost": ({f"lacre_fabric_connected{{{G2}}}": steady(0)}, 0, 2),
    "LacreRequestsFail": (everywhere("lacre_requests_total", rising(10), ',outcome="refused",problem="no-worker"'), 4, 8),
    "LacreSlowFirstByte": (
        histogram("lacre_request_first_byte_seconds", G1, "60.0") | histogram("lacre_request_first_byte_seconds", G2, "60.0"),
        9, 14,
    ),
    "LacrePoolWithoutWorkers": (everywhere("lacre_workers", steady(0), f",{POOL}"), 1, 3),
    "LacreQueueMissing": ({f'lacre_queue_missing{{{G1},pool="default"}}': steady(1)}, 0, 2),
    "LacrePoolAway": ({f'lacre_pool_away{{{G1},pool="default"}}': steady(1)}, 0, 2),
    "LacrePoolSaturated": (everywhere("lacre_worker_slots", steady(0), f',{POOL},state="free"'), 4, 6),
    "LacreReceiptsMissing": (everywhere("lacre_settlements_total", rising(2), ',result="unreceipted"'), 14, 18),
    "LacreManifestExpires": (everywhere("lacre_manifest_expiry_timestamp_seconds", steady(11 * 3600)), 9, 11),
    "LacreManifestExpiresSoon": (everywhere("lacre_manifest_expiry_timestamp_seconds", steady(2 * 3600 + 90)), 1, 3),
    "LacreManifestIgnored": ({f"lacre_manifests_ignored_total{{{G1}}}": "0x10 1x50"}, 9, 12),
    "LacreRulesRefused": ({f"lacre_rules_refused{{{G1}}}": steady(1)}, 1, 3),
    "LacreAuditNotWritable": ({f"lacre_audit_writable{{{G2}}}": "1x10 0x50"}, 9, 12),
    "LacreAuditCommitsFail": ({f"lacre_audit_commit_failures_total{{{G2}}}": "0x10 3x50"}, 9, 12),
    "LacreAuditSlow": (histogram("lacre_audit_commit_seconds", G1, "1.0"), 9, 14),
}  # fmt: skip


@pytest.fixture(scope="module")
def promtool() -> str:
    if PROMTOOL is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    return PROMTOOL


def checked(promtool: str, folder: Path, series: Mapping[str, str], firing: Mapping[int, list[str]]) -> str:
    """Runs promtool's own test of the rules. firing: the alerts at each minute. Returns what it says; empty if all is so."""
    expected = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
        }
        for minute, names in firing.items()
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": expected,
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_a_healthy_deployment_is_silent(promtool: str, tmp_path: Path) -> None:
    assert checked(promtool, tmp_path, healthy(), {minute: [] for minute in (0, 5, 15, 30, 60)}) == ""


@pytest.mark.parametrize("alert", FAULTS)
def test_each_alert_fires_for_its_fault_alone(alert: str, promtool: str, tmp_path: Path) -> None:
    series, silent, fires = FAULTS[alert]
    # A manifest that is about to expire also expires within hours, once that has lasted.
    assert checked(promtool, tmp_path, {**healthy(), **series}, {silent: [], fires: [alert]}) == ""


def test_the_check_can_say_no(promtool: str, tmp_path: Path) -> None:
    assert "FAILED" in checked(promtool, tmp_path, healthy(), {5: ["LacreNoGateway"]})


def test_every_alert_has_its_fault_and_its_words() -> None:
    assert FAULTS.keys() == ALERTS.keys()
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} == rule["annotations"].keys()


def test_alerts_ask_for_what_gateways_count() -> None:
    named = {name for rule in ALERTS.values() for name in named_in(rule["expr"])}
    assert len(named) > 12
    assert named - counted() == set()


def test_the_chart_makes_a_rule_of_them(promtool: str, tmp_path: Path) -> None:
    (found,) = render("on").of("PrometheusRule")
    assert found["metadata"]["labels"]["release"] == "prometheus"
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(found["spec"]))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["spec"] == yaml.safe_load(RULES.read_text())
    assert not render("defaults").of("PrometheusRule")
    assert validated([{**found, "spec": {"groups": [{"name": "a", "rules": [{"expr": 1}]}]}}])[:-1], "the schema can say no"


def test_the_docs_list_them_all() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    assert [name for name, rule in ALERTS.items() if f"| `{name}` | {rule['labels']['severity']} |" not in page] == []
