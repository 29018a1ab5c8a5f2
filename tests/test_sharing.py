"""How `pytest -n` shares the tests out: whole files, some split, some alone at the end; and the list of `make test-quick`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sharing import ALONE, LONGEST, SPLIT, TOGETHER

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
from sharing import Sharing
def pytest_xdist_make_scheduler(config, log):
    return Sharing(config, log)
"""
TESTS = """
import os, pathlib, time, pytest
@pytest.mark.parametrize("number", range(6))
def test_one(number):
    with open(pathlib.Path.cwd() / "log", "a") as log:
        began = time.monotonic()
        time.sleep(0.02)
        log.write(f"{pathlib.Path(__file__).relative_to(os.getcwd())} {os.getpid()} {began} {time.monotonic()}\\n")
"""
ORDINARY = tuple(f"tests/room/test_{name}.py" for name in "abcdefgh")
SHARING = tuple(f"{folder}/test_{name}.py" for folder in TOGETHER for name in "abc")


@dataclass(frozen=True)
class Ran:
    file: str
    process: str
    began: float
    ended: float


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    """The tests of a small tree, in three processes."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*ORDINARY, *SHARING, *SPLIT, *ALONE):
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TESTS)
    (tree / "conftest.py").write_text(CONFTEST)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "-p", "no:cacheprovider", "--import-mode=importlib", "tests"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tree, env=environment, timeout=100)
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in (tree / "log").read_text().splitlines()]
    return [Ran(file, process, float(began), float(ended)) for file, process, began, ended in lines]


@pytest.mark.slow
def test_each_test_runs_once(ran: list[Ran]) -> None:
    assert len(ran) == 6 * len({*ORDINARY, *SHARING, *SPLIT, *ALONE})


def test_a_file_stays_in_one_process(ran: list[Ran]) -> None:
    assert len({each.process for each in ran}) == 3
    for file in (*ORDINARY, *ALONE):
        assert len({each.process for each in ran if each.file == file}) == 1


def test_the_files_of_a_folder_stay_together(ran: list[Ran]) -> None:
    for folder in TOGETHER:
        assert len({each.process for each in ran if each.file.startswith(folder)}) == 1


def test_some_run_when_all_others_have_ended(ran: list[Ran]) -> None:
    others = max(each.ended for each in ran if each.file not in ALONE)
    assert min(each.began for each in ran if each.file in ALONE) > others
    assert len({each.process for each in ran if each.file in ALONE}) == 1


@pytest.mark.parametrize("file", [*LONGEST, *SPLIT, *ALONE])
def test_names_a_file_that_is_here(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("folder", TOGETHER)
def test_names_a_folder_that_is_here(folder: str) -> None:
    assert (ROOT / folder).is_dir()


def test_names_a_file_once() -> None:
    assert len({*LONGEST}) == len(LONGEST)
