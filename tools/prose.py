"""Lists prose that is hard to read: sentences over 30 words, idioms with a plain alternative, and pages that are too long.

python tools/prose.py [PATH]...

It reads Markdown, comments of settings and scripts, and the comments, docstrings and longer strings of Python files.
Without paths it reads everything that people read, but not `tests`. It exits with 1 if it lists anything.

- A full stop, a question mark or an exclamation mark ends a sentence. A colon, a semicolon or a dash does not.
- Table cells, list items, headings and comments are separate texts.
- A code span, a URL and the value in an f-string are one word each. It skips code blocks.
- It skips pages and tables that `make` writes: it finds their words in the Python files they come from.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
MOST_WORDS: Final = 30  # people read longer sentences twice; aim at 25
MOST_LINES: Final = 200  # of a page: a reader in a hurry stops there
README_LINES: Final = 100
LONG_PAGES: Final = frozenset({"wire.md", "errors.md", "threat-model.md"})  # a specification, and two that `make` writes
MESSAGE_WORDS: Final = 6  # a shorter string is a name, a header or a piece of code
PLAIN_SHARE: Final = 0.7  # of a string's words that consist of letters; code has fewer

READ: Final = (
    *("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "Dockerfile", "Makefile", "pyproject.toml", ".ci"),
    *("docs", "sdk", "gateway", "fabric", "backend", "tools", "bench", "examples", "deploy", "policies"),
)
COMMENT_SIGNS: Final = {
    **dict.fromkeys((".yaml", ".yml", ".toml", ".conf", ".sh", ".cfg", "Dockerfile", "Makefile", "run"), "#"),
    **dict.fromkeys((".cedar", ".cedarschema"), "//"),
}
CODE: Final = "`…`"  # stands for a piece of code: one word

# A pattern, in which a space matches any white space, and the words to write in its place.
IDIOMS: Final = tuple(
    (re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), plain)
    for pattern, plain in (
        (r"\b(?:go|goes|gone|going|went) on with\b", "continue, resume"),
        (r"\b(?:where|when|if|unless|is|are|was|were) left out\b", "if omitted; default: …"),
        (r"\bwhere (?:absent|missing|given|asked|needed)\b", "if …"),
        (r"\b(?:as|such as|but|even|save) where\b", "for example if …; except if …"),
        (r"\bnobody['’]s\b", "unexpected …; belongs to no …"),
        (r"\b(?:by|to|of|from|for|with) nobody\b", "the actor: no client …"),
        (r"\bheard (?:by|of)\b", "the actor: clients reject …"),
        (r"\blets? (?:nobody|anybody|everybody) in\b", "refuses every request; accepts …"),
        (r"\bthat there (?:is|are|was|were) (?:not|none)\b", "unknown …; missing …"),
        (r"(?<!there\s)\b(?:is|are|was|were) (?-i:none)(?=[.:;,)]|$)", "is not a …; does not …"),
        (r"\bwho(?:so)?ever\b", "the caller, the operator, anyone who …"),
        (r"(?<!\bthe\s)(?<!\bno\s)(?<!\bany\s)\bone who\b", "a caller that …"),
        (r"\bwhatever\b", "any …, all …"),
        (r"\bwhat (?:is|was|are|were|has been|had been) \w+ed\b", "the thing: the sealed request, …"),
        (r"\bwhat (?:is|was|are|were) (?:sent|left|kept|held|made|begun|given|known|read|told|shown|lost|found|written)\b",
         "the thing: the bytes sent, …"),
        (r"\bwhat (?:came|comes|goes|went|stands|stood|lies|lay|runs|ran|follows)\b", "the thing: the bytes received, …"),
        (r"\bwhat there (?:is|was|are|were)\b", "the thing"),
        (r"\bthat which\b", "the thing"),
        (r"\bof one['’]s own\b", "your own …"),
        (r"(?<!\bof\s)\bone['’]s own\b", "your own"),
        (r"[,;:] for (?:it|they|he|she|we|there|then|otherwise|nothing|nobody)\b", "because …"),
        (r"\banew\b", "again; new"),
        (r"\bno more(?=[.:;,)]|$)", "no longer"),
        (r"\b(?:not|no|never|nor|nothing|none|nobody|without)\b[^.;:]{0,60}\bany more\b", "no longer"),
        (r"['’]s to (?:say|decide|choose|judge|tell|make|take|keep|give)\b", "… decides"),
        (r"\bspeaks? of\b", "mention"),
        (r"\bknow(?:s|n)? nothing of\b", "does not know"),
        (r"\bthe very\b", "the same; exactly the"),
        (r"\bto the letter\b", "exactly"),
        (r"\bput(?:s|ting)? to work\b", "activate, use"),
        (r"\bthe like\b", "similar …"),
        (r"\b(?:be|is|are|was|were|been) had\b", "be available; be obtained"),
        (r"\bis worth nothing\b", "is useless"),
        (r"\bkept nowhere\b", "is not stored"),
        (r"\btill\b", "until"),
        (r"\b(?:lest|albeit|nought|thence|hence|whilst|whither|unto)\b", "a usual word"),
        (r"\b(?:where|there)(?:by|in|of|upon)\b", "a usual word"),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Passage:
    """A text of its own, as a person reads it, with the lines of the file as its lines."""

    line: int
    text: str

    def line_of(self, offset: int) -> int:
        """The line of the file that holds the character `offset`."""
        return self.line + self.text.count("\n", 0, offset)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """What to rewrite, and where it is."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


# Sentences

_END: Final = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")
_ABBREVIATION: Final = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|etc|ca|approx|resp)|\b[A-Z])\.$")
_WORDS: Final = re.compile(r"[^\s—–]+")
_PLAIN: Final = re.compile(r"[(\"'“‘]*[A-Za-z][a-z'’-]*[.,:;!?)\"'”’]*")


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Each sentence with the offset of its first character."""
    start = 0
    for end in _END.finditer(text):
        if not _ABBREVIATION.search(text, start, end.start() + 1):
            yield from _stripped(text, start, end.end())
            start = end.end()
    yield from _stripped(text, start, len(text))


def words(sentence: str) -> list[str]:
    """The words of a sentence; a sign alone does not count."""
    return [word for word in _WORDS.findall(sentence) if CODE in word or re.search(r"\w", word)]


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    part = text[start:end]
    if part.strip():
        yield start + len(part) - len(part.lstrip()), part.strip()


# Markdown; docstrings and comments are read as Markdown too

_SPAN: Final = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_LINK: Final = re.compile(r"!?\[([^\]]*)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)")
_URL: Final = re.compile(r"<?\b[a-z][a-z+]*://[^\s)>]*>?")
_TAG: Final = re.compile(r"<!--.*?-->|</?[a-z][^>\n]*>", re.DOTALL)
_FENCE: Final = re.compile(r"\s*(?:```|~~~)")
_ITEM: Final = re.compile(r"(\s*(?:[-*+]|\d+[.)])\s+)(.*)", re.DOTALL)
_RULE: Final = re.compile(r"[\s|:=*_-]*$")
_WRITTEN: Final = re.compile(r"<!-- from here on written by .*? -->.*?<!-- to here -->", re.DOTALL)


def reduced(text: str) -> str:
    """Without markup: code and addresses as one word each, links as their text. Lines stay lines."""
    text = _SPAN.sub(_code, text)
    text = _URL.sub(CODE, _LINK.sub(r"\1", text))
    return _TAG.sub(_blank, text).replace("**", "").replace("__", "")


def markdown(text: str, line: int = 1) -> Iterator[Passage]:
    """The texts of a Markdown document whose first line is `line` of the file."""
    text = _WRITTEN.sub(_blank, text)
    open_lines: list[str] = []  # of the paragraph or list item that goes on
    began = indent = 0
    fenced = False

    def closed() -> Iterator[Passage]:
        if open_lines:
            yield Passage(began, reduced("\n".join(open_lines)))
            open_lines.clear()

    for number, row in enumerate(text.split("\n"), line):
        row = re.sub(r"^\s*> ?", "", row)  # noqa: PLW2901 - a quotation is read as what it quotes
        if _FENCE.match(row):
            yield from closed()
            fenced = not fenced
        elif fenced:
            continue
        elif _RULE.match(row):
            yield from closed()
        elif row.lstrip().startswith("|") or re.match(r"#{1,6} ", row):
            yield from closed()
            cells = re.split(r"(?<!\\)\|", reduced(row)) if row.lstrip().startswith("|") else [reduced(row).lstrip("# ")]
            yield from (Passage(number, cell) for cell in cells if cell.strip())
        elif item := _ITEM.match(row):
            yield from closed()
            indent, began = len(item[1]), number
            open_lines.append(item[2])
        elif open_lines:
            open_lines.append(row)
        elif (depth := len(row) - len(row.lstrip())) < indent + 4:  # deeper, it is a block of code
            indent = indent if depth else 0
            began = number
            open_lines.append(row)
    yield from closed()


def _code(found: re.Match[str]) -> str:
    return CODE + "\n" * found[0].count("\n")


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


# Python

_DIRECTIVE: Final = re.compile(r"^(?:!|(?:noqa|type: ignore|pragma|fmt|ruff|mypy|hadolint)\b\S*(?: [A-Z]+\d+,?)*[ -]*)")


def python(text: str) -> Iterator[Passage]:
    """The comments, the docstrings and the messages of a Python file."""
    yield from _comments(text)
    for node, value, documents in _strings(ast.parse(text)):
        last = node.end_lineno or node.lineno
        for passage in markdown(_dedented(value) if documents else value, node.lineno):
            kept = passage if documents else _message(passage)
            if kept is not None:
                yield Passage(min(kept.line, last), kept.text)


def _comments(text: str) -> Iterator[Passage]:
    """Comments on lines that follow each other, in one column, are one text."""
    block: list[str] = []
    first = last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        (row, start), alone = token.start, not token.line[: token.start[1]].strip()
        if not (alone and block and row == last + 1 and start == column):
            yield from markdown("\n".join(block), first)
            block, first, column = [], row, start
        block.append(_DIRECTIVE.sub("", token.string[1:].removeprefix(" ")))
        last = row
    yield from markdown("\n".join(block), first)


def _strings(node: ast.AST) -> Iterator[tuple[ast.expr, str, bool]]:
    """Each string, joined from its pieces, and whether it is a docstring: a string that stands alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) and isinstance(child.value.value, str):
            yield child.value, child.value.value, True
        elif isinstance(child, ast.expr) and (value := _joined(child)) is not None:
            yield child, value, False
            for part in ast.walk(child):
                if isinstance(part, ast.FormattedValue):
                    yield from _strings(part)
        else:
            yield from _strings(child)


def _joined(node: ast.expr) -> str | None:
    """The text of a string, of an f-string or of a sum that has one; a computed part is one word. None: not a string."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else CODE for part in parts)  # type: ignore[misc]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pieces = (_joined(left), _joined(right))
            return None if pieces == (None, None) else "".join(CODE if piece is None else piece for piece in pieces)
        case _:
            return None


def _message(passage: Passage) -> Passage | None:
    """The text if a person reads it; None if it is code, a pattern or a name."""
    parts = words(passage.text)
    plain = sum(1 for word in parts if word == CODE or _PLAIN.fullmatch(word))
    short = len(parts) < MESSAGE_WORDS and "nobody" not in passage.text
    return None if short or plain < PLAIN_SHARE * len(parts) else passage


def _dedented(docstring: str) -> str:
    """As `inspect.cleandoc` does, with every line kept."""
    first, *rest = docstring.expandtabs().split("\n")
    margin = min((len(row) - len(row.lstrip()) for row in rest if row.strip()), default=0)
    return "\n".join([first.lstrip(), *(row[margin:] for row in rest)])


# Files


def passages(path: Path) -> Iterator[Passage]:
    """The texts of a file; none, if it is of a kind that is not read."""
    sign = COMMENT_SIGNS.get(path.suffix or path.name)
    if path.suffix not in {".md", ".py"} and sign is None:
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        if not re.search(r"\A.*\n\n\*Written by `make", text):
            yield from markdown(text)
    elif path.suffix == ".py":
        yield from python(text)
    else:
        yield from _scripted(text, str(sign))


def _scripted(text: str, sign: str) -> Iterator[Passage]:
    """The comments of a file of settings or of a script."""
    block: list[str] = []
    first = 0
    for number, row in enumerate(text.split("\n"), 1):
        before, found, after = row.partition(sign)
        if found and not before.strip():
            first = first if block else number
            block.append(_DIRECTIVE.sub("", after.removeprefix(" ")))
            continue
        yield from markdown("\n".join(block), first)
        block = []
        if trailing := re.search(rf"\s{sign} (.*)", row):
            yield from markdown(trailing[1], number)
    yield from markdown("\n".join(block), first)


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files at these paths and below, without hidden folders and folders that are made."""
    for path in paths:
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if file.is_file())
            hidden = ("__pycache__", "node_modules")
            yield from (
                file
                for file in below
                if not any(part in hidden or part.startswith(".") for part in file.relative_to(path).parts)
            )
        elif path.is_file():
            yield path


def findings(path: Path, root: Path = ROOT) -> Iterator[Finding]:
    """What to rewrite in one file."""
    name = str(path.relative_to(root) if path.is_relative_to(root) else path)
    for passage in passages(path):
        for offset, sentence in sentences(passage.text):
            if (count := len(words(sentence))) > MOST_WORDS:
                yield Finding(name, passage.line_of(offset), f"{count} words: {_shortened(sentence)}")
        for pattern, plain in IDIOMS:
            for found in pattern.finditer(passage.text):
                yield Finding(name, passage.line_of(found.start()), f'"{_shortened(found[0])}": write {plain!r}')
    most = README_LINES if name == "README.md" else MOST_LINES
    if path.suffix == ".md" and path.name not in LONG_PAGES and (name == "README.md" or name.startswith("docs/")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > most:
            yield Finding(name, count, f"{count} lines: at most {most}, or two pages")


def _shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 90 else f"{flat[:89]}…"


def main(arguments: Sequence[str]) -> int:
    """Prints what to rewrite in the files named, or in all; 1 if there is any."""
    missing = [name for name in arguments if not Path(name).exists()]
    if missing:
        print(f"No such file or folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    named = [Path(name).resolve() for name in arguments] or [ROOT / name for name in READ]
    found = [finding for path in files(named) for finding in sorted(findings(path))]
    for finding in found:
        print(finding)
    print(f"{len(found)} to rewrite." if found else "Nothing to rewrite.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
