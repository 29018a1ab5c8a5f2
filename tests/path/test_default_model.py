"""`lacre up` without a model: it serves the type of the default model that is the fastest here, and clients can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lacre_backend.models.gguf import find
from parts.up import Up, run

MEASURING = "Measuring once which type of the default model is the fastest on this machine: BF16, Q8_0, Q6_K, F16"


@pytest.mark.slow
def test_the_fastest_type_is_measured_once_and_served(tmp_path: Path) -> None:
    """Which type that is, or whether it is the shipped file, is the machine's business."""
    state = tmp_path / "state"
    first = run("model", "default", "--json", state=state)
    assert MEASURING in first.stderr and first.returncode == 0
    found = json.loads(first.stdout)
    if found["record"] is None:
        pytest.skip(found["told"])  # the machine is too busy for a clear measurement
    served, shipped = find(Path(found["path"])), find()
    assert found["record"]["digest"] == served.digest and found["record"]["source"] == shipped.digest
    with Up.start(state, as_shipped=False) as up, up.client() as client:
        log = up.log.read_text()
        assert "Measuring" not in log and f"smollm2-135m: {found['told']}" in log
        assert client.chat("Hi.", max_tokens=2).receipt.model == served.digest
        settings = (state / "workers" / "default" / "worker.toml").read_text()
        assert (f'default_model = "{served.path}"' in settings) is (served != shipped)
        assert (
            served.digest in run("worker", "digests", "--settings", str(state / "workers" / "default" / "worker.toml")).stdout
        )
    with Up.start(state) as up, up.client() as client:
        assert client.chat("Hi.", max_tokens=2).receipt.model == shipped.digest
    assert not list((tmp_path / "cache").rglob("*.draft"))
