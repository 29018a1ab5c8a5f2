"""The runbooks, as they stand: the shell blocks of each are one session (see `parts.runbooks`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from parts import runbooks
from parts.runbooks import FOLDER, Stage, blocks, check_shown, run, stage_of

RUNBOOKS = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("runbook", RUNBOOKS)
async def test_a_runbook(runbook: str, tmp_path: Path) -> None:
    async with stage_of(runbook)(tmp_path) as stage:
        await run(RUNBOOKS[runbook], tmp_path, stage)


def test_every_stage_has_its_runbook() -> None:
    stages = {path.stem for path in Path(runbooks.__file__).parent.glob("*.py")} - {"__init__"}
    assert stages == {name.replace("-", "_") for name in RUNBOOKS}


SESSION = "# Page\n\n```sh\nfirst=1\n```\n\nText.\n\n```sh\n{command}\n```\n\n```text\nfirst … done\n```\n"


async def played(command: str, folder: Path) -> str:
    return await run(SESSION.format(command=command), folder, Stage(environment={"MORE": "2"}))


async def test_a_session_is_one_shell(tmp_path: Path) -> None:
    assert "first 1  2 done\n" in await played('sleep 100 &\necho "first $first  $MORE done"', tmp_path)


@pytest.mark.parametrize(
    "command", ["false", "echo first done; cat missing | head -1", 'echo "first $missing done"', "echo other"]
)
async def test_a_session_that_fails(command: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        await played(command, tmp_path)


@pytest.mark.parametrize(
    "block",
    [
        "```console\n$ ls\n```",
        "~~~sh\nls\n~~~",
        "  ```sh\n  ls\n  ```",
        "```\nls\n```",
        "```sh\nls || true\n```",
        "```sh\nexit 0\n```",
    ],
)
def test_a_block_that_would_not_run_is_refused(block: str) -> None:
    with pytest.raises(AssertionError):
        blocks(f"# Page\n\n```sh\nls\n```\n\n{block}\n")


def test_a_line_that_nothing_printed() -> None:
    check_shown(["manifest … published"], "a\nmanifest  version 3\tpublished\n")
    with pytest.raises(AssertionError):
        check_shown(["manifest … published"], "manifest\npublished\n")
