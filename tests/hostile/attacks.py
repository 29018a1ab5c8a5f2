"""What an attack is, and the one list of them: every test of this folder is an `@attack`.

The words are those of the table in `docs/threat-model.md`, and `refused` is what the test itself asserts: neither can change
without the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from lacre import ApiError
from lacre.errors import LacreError
from lacre.problems import Problem

Adversary = Literal["gateway", "fabric", "client", "stranger", "worker", "issuer", "credential", "disk", "machine"]
F = TypeVar("F", bound=Callable[..., Any])

ADVERSARIES: dict[Adversary, str] = {
    "gateway": "The owner of gateway and fabric: holds the gateway's keys, relays every byte, owns the message server",
    "fabric": "The owner of the message server only: holds everything in it, and no key of the gateway",
    "client": "A caller with a token, against workers and gateway",
    "stranger": "Anyone who can reach a port of the gateway, without a token",
    "worker": "A worker of the pool, against the gateway's books and the caller's",
    "issuer": "The server of a token issuer's documents, without the issuer's signing key, against the gateway that reads them",
    "credential": "A thief of one credential of the message server, against the rest of the site",
    "disk": "Anyone who can write to the disk of a gateway, and holds none of its keys, against its audit log",
    "machine": "Anyone who meets what a person's machine keeps, or speaks to it: saved logins, and states of running answers",
}
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Attack:
    """name: what the adversary does. defence: what stands against it. refused: the error or problem that says so; None where
    nothing is refused by design, and then `gain` says exactly what the adversary has won. code: of an ApiError.
    """

    name: str
    by: Adversary
    defence: str
    refused: type[LacreError] | Problem | None
    code: str = ""
    gain: str = NOTHING

    @property
    def outcome(self) -> str:
        """The table's column of outcomes."""
        if self.refused is None:
            return f"gains: {self.gain}"
        if isinstance(self.refused, Problem):
            said = f"problem `{self.refused.slug}`"
        else:
            said = f"`{self.refused.__name__}`" + (f", code `{self.code}`" if self.code else "")
        return said if self.gain == NOTHING else f"{said}; gains: {self.gain}"


def attack(
    name: str,
    by: Adversary,
    defence: str,
    refused: Any = None,
    *,
    code: str = "",
    gain: str = NOTHING,
    cases: Any = None,
    ids: Any = None,
) -> Callable[[F], F]:
    """Marks a test as an attack. cases: those in which it is tried, one after another, as the argument `case`."""

    def mark(function: F) -> F:
        function.attack = Attack(name, by, defence, refused, code, gain)  # type: ignore[attr-defined]
        return function if cases is None else pytest.mark.parametrize("case", cases, ids=ids)(function)

    return mark


@dataclass(slots=True)
class Verdict:
    """Given to a test to say how its attack ended, in the words of its own mark."""

    attack: Attack
    given: bool = field(default=False)

    @contextmanager
    def refused(self) -> Iterator[pytest.ExceptionInfo[LacreError]]:
        """The block must raise exactly the error of the mark; for a problem, the SDK's error that names it."""
        expected = self.attack.refused
        kind: type[LacreError] = type(expected.exception()) if isinstance(expected, Problem) else expected  # type: ignore[assignment]
        with pytest.raises(kind) as caught:
            yield caught
        assert type(caught.value) is kind
        if isinstance(expected, Problem):
            assert caught.value.problem == expected.type  # type: ignore[attr-defined]
        if isinstance(caught.value, ApiError):
            assert caught.value.code == self.attack.code
        self.given = True

    def said(self, problem: str | None) -> None:
        """The worker's word before the seal was opened."""
        assert isinstance(self.attack.refused, Problem)
        assert problem == self.attack.refused.type
        self.given = True

    def answered(self, status: int, code: str | None) -> None:
        """The worker's word inside the seal."""
        assert self.attack.refused is ApiError
        assert (status >= 400, code) == (True, self.attack.code)
        self.given = True


def every() -> dict[str, Attack]:
    """Each attack of this folder by the id of its test."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"hostile.{path.stem}")
        for name, member in vars(module).items():
            if isinstance(marked := getattr(member, "attack", None), Attack):
                found[f"tests/hostile/{path.name}::{name}"] = marked
    return found
