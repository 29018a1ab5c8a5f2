"""What only tests use belongs to the tests: each name of the four packages is used by one of them, or documented."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sdk/lacre", "fabric/lacre_fabric", "gateway/lacre_gateway", "backend/lacre_backend")
WORD = re.compile(r"[A-Za-z_]\w*")

# What nothing of ours calls, and why it stays.
UNCALLED = {
    "encode_request_indeterminate": "a form that other senders use (RFC 9292 section 3.2), and that the wire must open",
    "unexplained": "for callers of `reply.recount()`",
}


def words(source: str) -> Iterator[str]:
    """Every word of the code, strings included, without comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.string
        elif token.type == tokenize.STRING and not token.string.startswith('"""'):
            yield from WORD.findall(token.string)


def defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Functions, classes and constants; and of a class without a base, its methods."""
    for node in body:
        match node:
            case ast.ClassDef():
                yield node.name
                if not node.bases:
                    yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from [] if called_by_a_library(node) else [node.name]
            case ast.Assign():
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def called_by_a_library(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Of a command or of a route."""
    return any(isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) for each in node.decorator_list)


def unused(sources: Iterable[str], documents: Iterable[str] = ()) -> set[str]:
    """Names that stand once in all sources, where they are defined, and in no document."""
    names, found = set[str](), Counter[str]()
    for source in sources:
        names.update(name for name in defined(ast.parse(source).body) if not name.startswith("__"))
        found.update(words(source))
    told = {word for document in documents for word in WORD.findall(document)}
    return {name for name in names - told if found[name] < 2}


def test_what_only_tests_use_is_in_the_tests() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 300
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = unused((path.read_text() for path in files), (path.read_text() for path in documents))
    assert found == UNCALLED.keys(), "delete these, move them to the tests, or say in UNCALLED why they stay"


def test_unused_names_are_seen() -> None:
    one = '"""helped"""\nLIMIT = 1\ndef helped(): ...\nclass Kept:\n    def helps(self): ...\n    def told(self): ...\n'
    two = "from one import LIMIT, Kept\n"
    assert unused([one, two], ["call `told`"]) == {"helped", "helps"}
