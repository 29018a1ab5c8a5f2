"""The threat model's tables are those of the attacks: neither changes without the other."""

from __future__ import annotations

import ast
from pathlib import Path

from hostile.attacks import every
from hostile.table import DOCUMENT, with_tables


def test_the_document_is_up_to_date() -> None:
    document = DOCUMENT.read_text()
    assert with_tables(document) == document, "run `make threat-model`"


def test_names_are_one_attack_each() -> None:
    names = [attack.name for attack in every().values()]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


def test_every_attack_ends_in_a_word_about_it() -> None:
    for test, attack in every().items():
        assert attack.defence, test
        assert attack.refused is not None or attack.gain, test


def test_every_test_that_uses_an_adversary_is_an_attack() -> None:
    """None is forgotten: what is not marked says in its first line why."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name in ("test_eyes.py", "test_table.py", "test_mutations.py"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                marked = any("attack" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert marked or ast.get_docstring(node), f"{path.name}::{node.name}"
