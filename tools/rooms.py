"""Prints the import picture of each package: its rooms, floors and arrows, and what breaks its order.

python tools/rooms.py [--rooms] [TREE]

- A room is a module or a folder at the top of a package. An arrow leads from a room to one that it imports.
- `FLOORS` declares the order of the rooms, from the ground up. A room imports only rooms on lower floors.
- Every import counts: at the top of a file, inside a function, and for type checking alone.
- `--rooms` lists each room with what it imports. It exits with 1 if an import breaks a rule, or a package has too many rooms.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
FRONT: Final = "__init__"


@dataclass(frozen=True, slots=True)
class Package:
    """folder: where it lies. most_rooms, most_floors: the limits. floors: the rooms, from the ground up."""

    folder: str
    most_rooms: int
    most_floors: int
    floors: tuple[tuple[str, ...], ...]


PACKAGES: Final[Mapping[str, Package]] = {
    "lacre": Package(
        "sdk",
        21,
        12,
        (
            ("errors", "_version"),
            ("runtime", "wire"),
            ("problems", "jose"),
            ("trust", "asgi"),
            ("evidence",),
            ("exchange",),
            ("transport",),
            ("chat",),
            ("client",),
            ("direct", "openai", "legacy", "proxy", "page"),
            (FRONT, "cli"),
            ("__main__",),
        ),
    ),
    "lacre_fabric": Package(
        "fabric", 9, 5, ((FRONT, "native"), ("logs", "work"), ("keys",), ("nats",), ("settings",), ("operate",))
    ),
    "lacre_gateway": Package(
        "gateway",
        20,
        12,
        (
            (FRONT, "settings", "audit"),
            ("http",),
            ("auth", "probe"),
            ("budget",),
            ("policy",),
            ("observe", "doctor"),
            ("gateway",),
            ("relay",),
            ("admin", "app"),
            ("console",),
            ("top",),
            ("serve",),
            ("processes",),
            ("commands",),
            ("__main__",),
        ),
    ),
    "lacre_backend": Package(
        "backend",
        15,
        8,
        (
            (FRONT, "keyring", "app_thread", "node"),
            ("engine",),
            ("api", "models"),
            ("upstream", "workshop"),
            ("settings",),
            ("health", "engine_process"),
            ("serve",),
            ("commands",),
            ("__main__",),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """Of one package. arrows: the rooms that each room imports. files: the files that each file imports, by module."""

    name: str
    arrows: Mapping[str, frozenset[str]]
    files: Mapping[str, frozenset[str]]

    @property
    def count(self) -> int:
        return sum(map(len, self.arrows.values()))

    def heights(self) -> dict[str, int]:
        """The floor on which each room stands by its imports, from 1. Raises CycleError."""
        heights: dict[str, int] = {}
        for room in TopologicalSorter(self.arrows).static_order():
            heights[room] = 1 + max((heights[below] for below in self.arrows[room]), default=0)
        return heights


def modules(tree: Path) -> dict[str, Path]:
    """All modules of the four packages, by dotted name."""
    found = {}
    for name, package in PACKAGES.items():
        for path in (tree / package.folder / name).rglob("*.py"):
            parts = path.relative_to(tree / package.folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == FRONT else parts)] = path
    return found


def imported(source: str, known: Iterable[str]) -> Iterator[str]:
    """The modules of ours that a file imports. `from a import b` is an import of `a.b` if that is a module."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        yield from (name for name in names if name in known)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else FRONT


def pictures(tree: Path = ROOT) -> list[Picture]:
    """One for each package."""
    paths = modules(tree)
    files = {module: frozenset(imported(path.read_text(), paths.keys())) - {module} for module, path in paths.items()}
    made = []
    for name in PACKAGES:
        own = {module: used for module, used in files.items() if module.split(".")[0] == name}
        arrows: dict[str, set[str]] = {room_of(module): set() for module in own}
        for module, used in own.items():
            arrows[room_of(module)] |= {room_of(other) for other in used if other in own} - {room_of(module)}
        made.append(Picture(name, {room: frozenset(below) for room, below in arrows.items()}, own))
    return made


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        return list(found.args[1])
    return []


def faults(picture: Picture) -> Iterator[str]:
    """What breaks the rules, a sentence each."""
    package = PACKAGES[picture.name]
    floor = {room: number for number, rooms in enumerate(package.floors, 1) for room in rooms}
    if found := circle(picture.files):
        yield f"{picture.name}: files import each other: {' -> '.join(found)}"
    if found := circle(picture.arrows):
        yield f"{picture.name}: rooms import each other: {' -> '.join(found)}"
    elif (height := max(picture.heights().values())) > package.most_floors:
        yield f"{picture.name}: {height} floors, at most {package.most_floors}"
    if len(picture.arrows) > package.most_rooms:
        yield f"{picture.name}: {len(picture.arrows)} rooms, at most {package.most_rooms}"
    for room in sorted(floor.keys() ^ picture.arrows.keys()):
        yield f"{picture.name}: {room} is in FLOORS or in the tree, not in both"
    for room, below in picture.arrows.items():
        for other in sorted(below):
            if room in floor and other in floor and floor[other] >= floor[room]:
                yield f"{picture.name}: {room} imports {other}, which FLOORS does not put below it"


def main(arguments: list[str]) -> int:
    trees = [Path(argument) for argument in arguments if not argument.startswith("-")]
    wrong: list[str] = []
    print(f"{'package':<16}{'files':>6}{'rooms':>7}{'floors':>8}{'arrows':>8}{'circles':>9}")
    for picture in pictures(*trees[:1]):
        rooms, files = circle(picture.arrows), circle(picture.files)
        height = "-" if rooms else max(picture.heights().values())
        circles = "none" if not rooms and not files else "some"
        print(f"{picture.name:<16}{len(picture.files):>6}{len(picture.arrows):>7}{height:>8}{picture.count:>8}{circles:>9}")
        if "--rooms" in arguments and not rooms:
            for room, height in sorted(picture.heights().items(), key=lambda item: (item[1], item[0])):
                print(f"  {height:>2} {room:<12} {' '.join(sorted(picture.arrows[room]))}".rstrip())
        wrong += faults(picture)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
