"""What a newcomer's tools are told: `make help` names every target, a commit hook runs what CI runs, editors keep the form."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CORPUS = "tests/fuzz/corpus/"  # which .editorconfig leaves alone
MAX_LINE = 110  # characters: a terminal's width, or a little more


def targets() -> set[str]:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def test_help_has_one_line_for_each_target() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "help"]
    told = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env=outside).stdout.splitlines()
    assert sorted(line.split()[0] for line in told) == sorted(targets())
    assert [line for line in told if len(line) > MAX_LINE or not line.endswith(".")] == []


def test_every_target_that_makes_no_file_is_phony() -> None:
    written = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(written) == sorted(targets())


def test_a_commit_hook_runs_what_make_lint_runs() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    [hook] = repository["hooks"]
    assert (hook["entry"], hook["language"], hook["pass_filenames"]) == ("make lint", "system", False)


def test_the_tree_is_as_editorconfig_says() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    paths = [ROOT / name for name in listed if name and not name.startswith(CORPUS)]
    odd = [path for path in paths if path.is_file() and not _kept(path.read_text(encoding="utf-8"), path.name)]
    assert len(paths) > 500
    assert odd == []


def _kept(text: str, name: str) -> bool:
    lines = text.split("\n")
    indented = name == "Makefile" or not any(line.startswith("\t") for line in lines)
    ended = text == "" or text.endswith("\n")
    return "\r" not in text and ended and indented and all(line == line.rstrip() for line in lines)
