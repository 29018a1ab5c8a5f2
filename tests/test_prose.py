"""The check of prose, on small texts: what it must find, and what it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

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
