"""The bare SDK, with its five dependencies and nothing else of Lacre's, on every declared Python that is here.

Left out is what looks into the memory of the fabric's processes (tests/wire/test_wiping.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("environments", ROOT / "tools/environments.py")
assert _spec is not None and _spec.loader is not None
environments = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(environments)

FOUND = {".".join(path.name.removeprefix("python").split(".")[:2]): path for path in environments.pythons()}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_declared_are_those_of_the_project() -> None:
    for path in ("pyproject.toml", "sdk/pyproject.toml"):
        classifiers = tomllib.loads((ROOT / path).read_text())["project"]["classifiers"]
        declared = [each.rpartition(" ")[2] for each in classifiers if re.fullmatch(r"Programming Language .* 3\.\d+", each)]
        assert declared == list(environments.DECLARED), path


@pytest.mark.parametrize("version", environments.DECLARED)
def test_the_protocol_and_a_sealed_exchange(version: str) -> None:
    if version not in FOUND:
        pytest.skip(f"Python {version} is not installed")
    python = environments.ready("sdk", FOUND[version])
    command = [
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/wire", "--ignore", "tests/wire/test_wiping.py",
        "tests/sdk/test_client.py", "tests/sdk/test_trust.py", "tests/sdk/test_manifest.py", "tests/sdk/test_receipts.py",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT / "sdk")}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
