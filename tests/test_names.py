"""One word, one meaning: no public class of the four packages has the name of another."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sdk/lacre", "fabric/lacre_fabric", "gateway/lacre_gateway", "backend/lacre_backend")

# Names that several classes share, where each is, and why a reader is not misled.
SHARED = {
    (
        "Client",
        "sdk/lacre/client/_sync.py sdk/lacre/direct/_sync.py sdk/lacre/legacy/_sync.py",
    ): "the public doors: one client for each way in",
    (
        "AsyncClient",
        "sdk/lacre/client/_async.py sdk/lacre/direct/_async.py sdk/lacre/legacy/_async.py",
    ): "as `Client`, for asyncio",
    (
        "TimedOut",
        "sdk/lacre/errors.py sdk/lacre/legacy/messages.py",
    ): "the same error: legacy's is a subclass that is httpx's too",
    ("Unreachable", "sdk/lacre/errors.py sdk/lacre/legacy/messages.py"): "as `TimedOut`",
}


def public_classes(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def homonyms(sources: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """sources: paths with their text. Each name that has several classes, with their paths."""
    places = defaultdict(list)
    for path, source in sources:
        for name in public_classes(source):
            places[name].append(path)
    return {(name, " ".join(sorted(paths))) for name, paths in places.items() if len(paths) > 1}


def test_one_word_has_one_meaning() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 300
    found = homonyms((str(path.relative_to(ROOT)), path.read_text()) for path in files)
    assert not found - SHARED.keys(), "rename one of each, or say in SHARED why they mean the same"
    assert not SHARED.keys() - found, "these no longer share a name: take them out of SHARED"


def test_homonyms_are_seen() -> None:
    sources = [
        ("a.py", "class One: ...\nclass _Two: ...\nif True:\n    class Three: ...\n"),
        ("b.py", "class One: ...\nclass _Two: ..."),
    ]
    assert homonyms(sources) == {("One", "a.py b.py")}
