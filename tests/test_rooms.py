"""The import picture of `tools/rooms.py`: few rooms, in floors, without circles, each with a front that says where to begin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rooms

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 12  # lines of a front


FOLDERS = sorted(
    path.parent
    for name, package in rooms.PACKAGES.items()
    for path in (ROOT / package.folder / name).rglob("__init__.py")
    if path.parent.name != name
)


def test_this_tree_has_no_fault() -> None:
    found = rooms.pictures()
    assert len(found) == 4 and all(len(picture.files) > 50 for picture in found)
    assert [fault for picture in found for fault in rooms.faults(picture)] == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"wire/a.py": "import lacre.cli.b\n", "cli/b.py": ""}, "wire imports cli"),
        ({"wire/a.py": "def f():\n    from lacre.cli import b\n", "cli/b.py": ""}, "wire imports cli"),
        ({"wire/a.py": "if TYPE_CHECKING:\n    from lacre.wire.b import B\n", "wire/b.py": "from lacre.wire import a\n"},
         "files import each other"),
        ({"wire/a.py": "from lacre.jose.b import x\n", "jose/b.py": "from lacre.wire.c import y\n", "wire/c.py": ""},
         "rooms import"),
        ({"new.py": ""}, "new is in FLOORS or in the tree, not in both"),
        ({f"room{number}.py": "" for number in range(30)}, "30 rooms, at most 20"),
    ],
)  # fmt: skip
def test_a_fault_is_named(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    for name, source in files.items():
        path = tmp_path / "sdk/lacre" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    [picture] = [picture for picture in rooms.pictures(tmp_path) if picture.name == "lacre"]
    assert any(fault in found for found in rooms.faults(picture))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_has_a_front(folder: Path) -> None:
    """It says what the room is for, and names a file that is there."""
    front = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert front, "write in `__init__.py` what the room is for, its rules, and which file to open first"
    first = re.search(r"Open `([a-z0-9_]+\.py)`", front)
    assert first is not None and (folder / first[1]).is_file()
    assert len(front.splitlines()) <= LONGEST


PAGE = (ROOT / "docs/architecture.md").read_text()
PARTS = {name.removeprefix("lacre_").title(): f"{package.folder}/{name}" for name, package in rooms.PACKAGES.items()}
PARTS["SDK"] = PARTS.pop("Lacre")


def named() -> list[tuple[str, str, str]]:
    """The files that docs/architecture.md names in its tables of rooms: package, the row's rooms, file."""
    found, package = [], ""
    for line in PAGE.splitlines():
        if (heading := re.match(r"\*\*(.+?)\*\*", line)) is not None:
            package = PARTS.get(heading[1], "")
        elif package and line.startswith("| `"):
            _, rooms, _, files, _ = line.split("|")
            found += [(package, rooms, name) for name in re.findall(r"`([\w/]+)`", files)]
    return found


@pytest.mark.parametrize(("package", "row", "name"), named(), ids=lambda value: value.strip())
def test_the_architecture_page_names_files_that_exist(package: str, row: str, name: str) -> None:
    folders = [ROOT / package, *(ROOT / package / room for room in re.findall(r"`([\w/]+/)`", row))]
    assert any((folder / f"{name}.py").is_file() or (folder / name).is_dir() for folder in folders)


def test_the_architecture_page_names_every_room() -> None:
    for name, package in rooms.PACKAGES.items():
        shown = {room for floor in package.floors for room in floor} - {"__init__", "__main__", "_version"}
        rows = " ".join(row for part, row, _ in named() if part.endswith(f"/{name}"))
        assert [room for room in sorted(shown) if f"`{room}/`" not in rows and f"`{room}.py`" not in rows] == []
