"""Ten thousand calls from one async client: nothing is left behind, and memory stays where it was after the first thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
CALLS, CONCURRENCY = 10_000, 50


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_thousand_calls(record_property: Any) -> None:
    command = [sys.executable, "-m", "parts.many_calls"]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen([*command, "serve"], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            asking = [*command, "ask", url, str(CALLS), str(CONCURRENCY)]
            done = subprocess.run(asking, capture_output=True, text=True, env=environment, timeout=360, check=False)
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    record_property("many_calls", measured)
    print(measured)
    assert measured["calls"] == CALLS
    assert (measured["tasks_left"], measured["sockets_left"]) == (0, 0)
    assert measured["growth"] <= 0.05
