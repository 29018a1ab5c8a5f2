"""One mutation: a statement of the product, found by module, function and meaning, and what stands there instead.

The layout of the source does not matter: texts are compared as syntax trees. So a mutation outlives new neighbours, moved lines
and formatting, and a move of a module changes one dotted name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeAlias

ROOMS: Final = ("sdk", "fabric", "gateway", "backend")
ROOTS: Final = (*ROOMS, "tests")  # a fake of the tests may hold a defence too
Scope: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_SCOPES: Final = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BODIES: Final = ("body", "orelse", "finalbody", "handlers")  # what a header does not say


class NotFound(Exception):
    """The place is gone, or the statement stands in it more than once."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One defence taken away.

    by: the attack that must then succeed, as the threat model names it: `heads: path` is `test_heads.py::test_path`.
    defence: in the words of the threat model. place: `package.module:Class.method`, or `package.module` for its top level.
    old: stands once in `place` itself, functions and classes inside it not counted. It is a statement, an expression, a keyword
    argument (`name=value`), or the header of a compound statement with its colon (`if x:`, `except E as e:`, `class C(B):`).
    new: the same form; "" deletes a statement or an argument.
    """

    by: str
    defence: str
    place: str
    old: str
    new: str = "if False:"

    @classmethod
    def of(cls, *rows: tuple[str, ...]) -> tuple[Self, ...]:
        """One for each row of its fields."""
        return tuple(cls(*row) for row in rows)

    @property
    def test(self) -> str:
        """Under `tests/hostile/`."""
        return "test_{}.py::test_{}".format(*self.by.split(": "))

    def __str__(self) -> str:
        return self.defence

    @property
    def module(self) -> str:
        return self.place.partition(":")[0]

    def path(self, tree: Path) -> Path:
        """The module's file in a copy of the repository."""
        relative = Path(*self.module.split("."))
        for root in ROOTS:
            for found in (tree / root / relative.with_suffix(".py"), tree / root / relative / "__init__.py"):
                if found.is_file():
                    return found
        raise NotFound(f"there is no module {self.module}")

    def applied(self, source: str) -> str:
        """The module's source with this defence taken away.

        Raises NotFound when `place` does not exist, or when `old` stands in it not at all or more than once.
        """
        module = ast.parse(source)
        name = self.place.partition(":")[2]
        scope = _scope(module, name.split(".") if name else [])
        if scope is None:
            raise NotFound(f"there is no {self.place}")
        old, new = _snippet(self.old), _snippet(self.new or "pass")
        if isinstance(old, ast.Expr) and isinstance(new, ast.Expr):
            old, new = old.value, new.value
        header = self.old.endswith(":")
        wanted = _key(old, header=header)
        found = [node for node in _own(scope) if _key(node, header=header) == wanted]
        if len(found) != 1:
            raise NotFound(f"{len(found)} times in {self.place}: {self.old}")
        _Replace(found[0], _fitting(new, found[0])).visit(module)
        return ast.unparse(ast.fix_missing_locations(module)) + "\n"


def _fitting(new: ast.AST, found: ast.AST) -> ast.AST | None:
    """What takes the place of `found`: a header keeps the old body, an argument its name. None deletes an argument."""
    if isinstance(found, ast.keyword):
        return ast.keyword(found.arg, new.value) if isinstance(new, ast.Assign) else None
    for name in _BODIES:
        if hasattr(found, name) and hasattr(new, name):
            setattr(new, name, getattr(found, name))
    return new


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | None) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self._new if node is self._old else self.generic_visit(node)


def _snippet(text: str) -> ast.AST:
    """A text of a mutation as a tree: a statement, or a compound one with an empty body."""
    if text.startswith("except"):
        (trial,) = ast.parse(f"try:\n    pass\n{text}\n    pass").body
        assert isinstance(trial, ast.Try)
        return trial.handlers[0]
    (statement,) = ast.parse(f"{text}\n    pass" if text.endswith(":") else text).body
    return statement


def _key(node: ast.AST, *, header: bool) -> str:
    """Two nodes that mean the same have the same key. A header's key leaves out what follows the colon."""
    if isinstance(node, ast.keyword) and node.arg is not None:
        node = ast.Assign([ast.Name(node.arg, ast.Store())], node.value)
    if not header:
        return ast.dump(node)
    if not hasattr(node, "body"):
        return ""
    said = {name: value for name, value in ast.iter_fields(node) if name not in _BODIES}
    return ast.dump(type(node)(**said, body=[]))


def _scope(scope: Scope, names: list[str]) -> Scope | None:
    """The function or class of that qualified name."""
    if not names:
        return scope
    for node in _own(scope):
        if isinstance(node, _SCOPES) and node.name == names[0]:
            return _scope(node, names[1:])
    return None


def _own(scope: Scope) -> Iterator[ast.AST]:
    """All nodes of a scope, in it the functions and classes that it defines, but not what is inside those."""
    waiting: list[ast.AST] = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _SCOPES):
            waiting.extend(ast.iter_child_nodes(node))
