"""The project's own tools: what the check of prose finds, which suites CI runs, and what `make` and editors are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml

import changed_rooms
import prose

ROOT: Final = Path(__file__).resolve().parent.parent
CLAUSE: Final = "the worker opens the request and seals the answer"  # 9 words
FOUR: Final = [CLAUSE] * 4  # 36 words


def listed(tmp_path: Path, name: str, text: str) -> list[tuple[int, str]]:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return [(finding.line, finding.text) for finding in prose.findings(file, tmp_path)]


@pytest.mark.parametrize("joint", ["; ", ": ", ", and ", " — ", " (", "\n"])
def test_nothing_but_a_full_stop_ends_a_sentence(tmp_path: Path, joint: str) -> None:
    [(line, text)] = listed(tmp_path, "page.md", f"# Title\n\nFirst a short one. {joint.join(FOUR)}.\n")
    assert line == 3 and text.startswith(("36 words: ", "39 words: "))


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        (". ".join(FOUR) + "! " + "? ".join(FOUR) + ".\n", []),
        (" ".join(["word"] * 30), []),
        (" ".join(["word"] * 31), ["31 words"]),
        (f"{CLAUSE}, e.g. {CLAUSE}, i.e. {CLAUSE}, cf. {CLAUSE}.", ["39 words"]),
    ],
    ids=["short ones", "the limit", "above it", "an abbreviation ends none"],
)
def test_the_length_of_a_sentence(tmp_path: Path, text: str, counted: list[str]) -> None:
    assert [found[:8] for _, found in listed(tmp_path, "page.md", text)] == counted


def test_cells_and_items_are_texts_of_their_own(tmp_path: Path) -> None:
    table = f"| a | b |\n|---|---|\n| {CLAUSE} | {CLAUSE} |\n| {CLAUSE} | {'; '.join(FOUR)} |\n"
    items = f"\n- {CLAUSE}\n- {CLAUSE}\n  {CLAUSE}\n- {CLAUSE}\n1. {CLAUSE}\n2. {CLAUSE}:\n   {' and '.join(FOUR[:3])}\n"
    found = listed(tmp_path, "page.md", table + items)
    assert [(line, text[:8]) for line, text in found] == [(4, "36 words"), (11, "38 words")]


def test_code_is_one_word_or_none(tmp_path: Path) -> None:
    span, block = " ".join(["word"] * 40), "\n".join(["whoever went on with it"] * 9)
    text = f"A span is `{span}` one word, a link is [its text](https://example.com/a-b), an address https://a.example/ too.\n"
    text += f"\n```sh\n{block}\n```\n\nThe block below is indented:\n\n    whoever {span}\n"
    text += "\n- An item.\n\n      whoever\n\n  More.\n"
    assert listed(tmp_path, "page.md", text) == []
    [(_, found)] = listed(tmp_path, "page.md", f"`{span}` {'; '.join(FOUR[:3])} [{CLAUSE[:10]}](x.md) `a\nb` c.")
    assert found.startswith("32 words")


def test_what_make_writes_is_not_read(tmp_path: Path) -> None:
    table = f"| whoever |\n|---|\n| {'; '.join(FOUR)} |\n"
    written = f"<!-- from here on written by `make it` -->\n{table}<!-- to here -->\n"
    assert listed(tmp_path, "page.md", written + "After it, anew.\n") == [(6, "\"anew\": write 'again; new'")]
    assert listed(tmp_path, "docs/errors.md", f"# Errors\n\n*Written by `make errors` from the code.*\n\n{table}") == []


def test_python(tmp_path: Path) -> None:
    source = f'''\
"""A module.

{"; ".join(FOUR)}.
"""

# A comment that
# {", and ".join(FOUR)}.
LIMIT = 3  # whoever asks for more waits


def act(name: str) -> None:
    """Short, and it goes on

    with nothing."""
    if name:
        raise ValueError(f"the name {{name!r}} is too long: {"; ".join(FOUR[:2])}"
                         "; give one of at most 30 characters, or of 40 {{{{characters}}}} in a pool")
    log("%s whatever" % name)
    print("where left out, the name is that of the pool, and " + name)
'''
    found = [(line, text.partition(":")[0]) for line, text in listed(tmp_path, "module.py", source)]
    assert sorted(found) == [(3, "36 words"), (6, "42 words"), (8, '"whoever"'), (16, "38 words"), (19, '"where left out"')]


def test_code_in_strings_is_not_read(tmp_path: Path) -> None:
    source = (
        f'SQL = "SELECT {", ".join(f"c.col_{n}" for n in range(40))} FROM t"\n'
        r'PATTERN = r"(?:whatever|whoever)\b [a-z]+ \d{3} (\w+) = .*"'
        '\nNAME = "whatever"\nx = y  # type: ignore[misc]\nimport z  # noqa: F401 - it registers itself\n'
    )
    assert listed(tmp_path, "module.py", source) == []


@pytest.mark.parametrize(("name", "sign"), [("values.yaml", "#"), ("Makefile", "#"), ("rules.cedar", "//"), ("a.conf", "#")])
def test_comments_of_settings_and_scripts(tmp_path: Path, name: str, sign: str) -> None:
    rows = [f"{sign} {CLAUSE}" for _ in range(4)]
    text = "\n".join([*rows, "key: value", f"key: value {sign} where left out, none", f"{sign} {CLAUSE}.", ""])
    assert [(line, text[:8]) for line, text in listed(tmp_path, name, text)] == [(1, "36 words"), (6, '"where l')]


@pytest.mark.parametrize(
    ("idiom", "plain"),
    [
        ("A stream that breaks off is gone on with.", "A worker resumes a broken stream."),
        ("Four, where\nleft out.", "Default: four."),
        ("The address is none: see below.", "The address is not valid. There is none. The default is None."),
        ("A plan that there is not is refused.", "The gateway refuses unknown plans."),
        ("A signer is heard by nobody.", "Clients reject the signer."),
        ("The consumer is nobody's.", "The consumer is unexpected. Nobody uses it."),
        ("Whoever has a token may ask.", "Callers with a token may ask."),
        ("It tells what was sealed.", "It names the sealed request. What is new?"),
        ("From the very token.", "From the same token, and very soon."),
        ("Keys come late, for they are heavy.", "Keys come late, because they are heavy. It is for them."),
        ("It is not read any more.", "It is no longer read. Any more keys?"),
        ("A server of one's own.", "Your own server."),
    ],
)
def test_idioms_and_their_plain_alternatives(tmp_path: Path, idiom: str, plain: str) -> None:
    assert listed(tmp_path, "page.md", idiom)
    assert listed(tmp_path, "page.md", plain) == []


def test_pages_that_are_too_long(tmp_path: Path) -> None:
    assert listed(tmp_path, "docs/page.md", "Word.\n" * 201) == [(201, "201 lines: at most 200, or two pages")]
    assert listed(tmp_path, "README.md", "Word.\n" * 101) == [(101, "101 lines: at most 100, or two pages")]
    for name, lines in {"docs/wire.md": 201, "docs/page.md": 200, "README.md": 100, "CHANGELOG.md": 201}.items():
        assert listed(tmp_path, name, "Word.\n" * lines) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "below" / "bad.md"
    bad.parent.mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "page.md").write_text("Whoever.")
    good.write_text("All is well.")
    bad.write_text("Good.\n\nWhoever.")
    assert prose.main([str(good)]) == 0 and capsys.readouterr().out == ""
    assert prose.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{bad}:3: \"Whoever\": write 'the caller, the operator, anyone who …'\n"
    assert prose.main([str(tmp_path / "none.md")]) == 2


def test_every_file_is_found() -> None:
    """A name that is misspelt in `READ`, or a folder that moved, would leave its texts unread."""
    assert [name for name in prose.READ if not (ROOT / name).exists()] in ([], ["CONTRIBUTING.md"])
    read = {file.relative_to(ROOT).as_posix() for file in prose.files(ROOT / name for name in prose.READ)}
    assert read >= {"README.md", "docs/using.md", "sdk/lacre/errors.py", "deploy/helm/lacre/values.yaml", ".ci/run"}


# Which heavy suites CI runs, asked of real git repositories

NOON: Final = 1_700_000_000
HOUR: Final = 3600
SUITES: Final = {"one": ("room/one", "a file.lock"), "two": ("room/two",)}


class Repository:
    """A real one, whose commits have the times that they are given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, at: int = NOON) -> None:
        time = f"{at} +0000"
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"GIT_AUTHOR_DATE": time, "GIT_COMMITTER_DATE": time, "GIT_CONFIG_GLOBAL": os.devnull}
        who = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", self.root, *who, *arguments], check=True, env=env, capture_output=True)

    def commit(self, path: str, hours: int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{hours}")
        self.git("add", ".")
        self.git("commit", "-q", "-m", path, at=NOON + hours * HOUR)

    def touched(self) -> list[str]:
        told: list[str] = changed_rooms.touched(SUITES, changed_rooms.changed(self.root))
        return told


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "clone")
    made.commit("room/one/old.py", 0)
    made.commit("elsewhere.py", 1)
    return made


# After how many hours a file changed or git was called, and whose rooms that touched.
CHANGES: dict[str, tuple[list[tuple[int, str]], list[str]]] = {
    "nothing of theirs": ([(30, "room/onetime.py")], []),
    "a room": ([(30, "room/two/deep/down.py")], ["two"]),
    "a file that is a room": ([(30, "a file.lock")], ["one"]),
    "the whole last day and no more": ([(6, "room/two/early.py"), (31, "room/one/late.py"), (54, "elsewhere.py")], ["one"]),
    "letters beyond ASCII": ([(30, "room/one/olá\n🌊.py")], ["one"]),
    "what went counts too": ([(30, "git rm -q room/one/old.py"), (30, "git commit -q -m Away")], ["one"]),
    "what moved changed both rooms": ([(30, "git mv room/one/old.py room/two.py"), (30, "room/two/and.py")], ["one", "two"]),
    "an old branch merged today": (
        [(2, "git checkout -q -b side"), (2, "room/two/side.py"), (2, "git checkout -q main"), (40, "elsewhere.py"),
         (41, "git merge -q --no-ff -m Merge side")],
        ["two"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "touched"), CHANGES.values(), ids=CHANGES)
def test_what_changed(repository: Repository, changes: list[tuple[int, str]], touched: list[str]) -> None:
    for hours, what in changes:
        if what.startswith("git "):
            repository.git(*what.split()[1:], at=NOON + hours * HOUR)
        else:
            repository.commit(what, hours)
    assert repository.touched() == touched


class TestWhatIsNotKnown:
    """All of them run."""

    def test_no_git_or_no_commit(self, tmp_path: Path) -> None:
        assert changed_rooms.touched(SUITES, changed_rooms.changed(tmp_path)) == ["one", "two"]
        assert Repository(tmp_path / "empty").touched() == ["one", "two"]

    def test_a_history_that_does_not_reach_back(self, tmp_path: Path) -> None:
        young = Repository(tmp_path / "young")
        young.commit("elsewhere.py", 0)
        young.commit("elsewhere.py", 5)
        assert young.touched() == ["one", "two"]

    def test_a_clone_of_depth_one(self, repository: Repository, tmp_path: Path) -> None:
        repository.commit("elsewhere.py", 30)
        assert repository.touched() == []
        repository.git("clone", "-q", "--depth", "1", repository.root.as_uri(), str(tmp_path / "shallow"))
        assert changed_rooms.touched(SUITES, changed_rooms.changed(tmp_path / "shallow")) == ["one", "two"]


class TestThisProject:
    def test_its_rooms_are_there(self) -> None:
        for name, rooms in changed_rooms.suites().items():
            for room in rooms:
                assert (ROOT / room).exists(), f"tests/heavy/suites.toml: {name} has the room {room}, which is not there"

    def test_each_suite_has_its_rooms(self) -> None:
        folders = {path.parent.name for path in (ROOT / "tests/heavy").glob("*/test_*.py")}
        assert folders == set(changed_rooms.suites())

    def test_it_prints_names_of_suites(self) -> None:
        command = [sys.executable, "-P", ROOT / "tools/changed_rooms.py"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert set(done.stdout.split()) <= set(changed_rooms.suites())

    def test_ci_runs_what_it_prints(self) -> None:
        script = (ROOT / ".ci/run").read_text()
        assert "suites=$(python3 tools/changed_rooms.py)" in script and 'make test-heavy SUITES="$suites"' in script


# What a newcomer's tools are told: `make help` names every target, a commit hook runs what CI runs, editors keep the form

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
