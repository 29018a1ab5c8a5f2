"""What runs the runbooks notices what goes wrong in one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from parts.shell_session import BadPage, Session, SessionFailed, blocks

SECONDS = 60.0


def page(*parts: str) -> str:
    return "# A page\n\nText.\n\n" + "\n".join(f"```{part}\n```\n" for part in parts)


# Until then the process that bash began is another bash.
RUNS = "until grep --quiet ^sleep /proc/$!/comm; do :; done"


async def said(folder: Path, *parts: str, seconds: float = SECONDS) -> str:
    return await Session(folder, seconds, {"MORE": "more"}).run(blocks(page(*parts)))


async def test_blocks_are_one_session_whose_output_the_page_shows(tmp_path: Path) -> None:
    await said(
        tmp_path,
        "sh\nname=world\ncd /",
        'sh\necho "in $PWD"\necho hello $name, it is $((6 * 7)) $MORE',
        "text\nin /\nhello world, it is … more",
    )


@pytest.mark.parametrize(
    "parts, words",
    [
        (["sh\necho before", "sh\necho so far\nfalse\necho after"], "a command failed with 1"),
        (["sh\necho one\necho two", "text\ntwo\none"], "not in this order: one"),
        (["sh\necho one two", "text\none … one"], "not printed, or not in this order: one … one"),
        (["sh\necho word", "sh\necho other", "text\nword"], "not printed"),
        (["sh\n: shown only", "text\n$ : shown only"], "not printed"),
        (["sh\nfalse | cat"], "a command failed"),
        (['sh\nFROM_OUTSIDE=1\necho "$FROM"'], "a command failed"),
        ([f"sh\nsleep 300 &\n{RUNS}"], "it left processes behind: sleep 300"),
        ([f"sh\nsetsid sleep 300 > /dev/null 2>&1 &\n{RUNS}"], "it left processes behind: sleep 300"),
    ],
)
async def test_a_fault_ends_the_session_and_shows_it(tmp_path: Path, parts: list[str], words: str) -> None:
    os.environ["FROM"] = "outside"
    try:
        with pytest.raises(SessionFailed, match=re.escape(words)) as raised:
            await said(tmp_path, *parts)
    finally:
        del os.environ["FROM"]
    assert "after" not in str(raised.value).splitlines()
    if "before" in parts[0]:
        assert [line for line in str(raised.value).splitlines() if line in ("before", "so far")] == ["before", "so far"]


async def test_a_session_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(SessionFailed, match="it did not end within 1 s"):
        await said(tmp_path, "sh\nsleep 300", seconds=1)


@pytest.mark.parametrize(
    "parts",
    [
        ["python\nprint()"],
        ["sh\nx || true"],
        ["sh\n! grep x y"],
        ["sh\nset +e"],
        ["text\nshown before any command"],
        ["sh\nexit 0"],
        [],
    ],
)
def test_a_page_that_hides_something_is_refused(parts: list[str]) -> None:
    with pytest.raises(BadPage):
        blocks(page(*parts))


@pytest.mark.parametrize("block", ["~~~sh\nls\n~~~", "  ```sh\n  ls\n  ```", "```\nls\n```", "```sh\nls"])
def test_a_fence_of_another_spelling_is_refused(block: str) -> None:
    with pytest.raises(BadPage):
        blocks(page("sh\necho") + f"\n{block}\n")
