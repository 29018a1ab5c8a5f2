"""The rules of the house, checked on every file: imports point one way, one word has one meaning, and nothing is unused."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import rooms

ROOT = Path(__file__).resolve().parent.parent
# Of each other: the SDK needs none of them, and what stands on the fabric needs nothing beside it.
MAY_IMPORT: dict[str, set[str]] = {
    "lacre": set(), "lacre_fabric": {"lacre"}, "lacre_gateway": {"lacre", "lacre_fabric"},
    "lacre_backend": {"lacre", "lacre_fabric"},
}  # fmt: skip
# What a relay may read. The gateway never holds a pool's private key, and never has the code to use one.
# Of `padding`: how long padded messages are, no keys.
OF_WIRE_FOR_GATEWAY = ("lacre.wire.header", "lacre.wire.outer", "lacre.wire.padding")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports; `from a import b` counts as `a.b`, for b may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / rooms.PACKAGES[package].folder / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", rooms.PACKAGES)
def test_rooms_import_one_way(package: str) -> None:
    for path in files(package):
        used = {name.partition(".")[0] for name in imports(path)}
        assert used & rooms.PACKAGES.keys() <= MAY_IMPORT[package] | {package}, path


def test_wire_needs_cryptography_alone() -> None:
    for path in sorted((ROOT / "sdk/lacre/wire").glob("*.py")):
        for name in imports(path):
            top = name.partition(".")[0]
            ours = name.startswith(("lacre.wire", "lacre.errors"))
            assert ours or top == "cryptography" or top in sys.stdlib_module_names, f"{path}: {name}"
            assert top not in ("socket", "asyncio", "time", "logging", "threading"), f"{path}: the wire does no I/O"


def test_the_gateway_reads_headers_alone() -> None:
    for path in files("lacre_gateway"):
        for name in imports(path):
            if name.startswith("lacre.wire"):
                assert f"{name}.".startswith(tuple(f"{allowed}." for allowed in OF_WIRE_FOR_GATEWAY)), f"{path}: {name}"


def test_what_the_gateway_runs_seals_one_thing() -> None:
    """The key for MACs of receipts. Nothing else in what a gateway and the fabric share uses HPKE."""
    using = {path.stem for package in ("lacre_gateway", "lacre_fabric") for path in files(package)
             if any(name.startswith("lacre.wire.hpke") for name in imports(path))}  # fmt: skip
    assert using == {"settlement_keys"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("lacre_gateway.app, lacre_gateway.relay.relay", {"lacre.wire.opening"}),  # not even through what it imports
        ("lacre", {"fastapi", "nats", "llama_cpp", "openai", "pydantic", "typer", "rich", "starlette", "numpy"}),
    ],
    ids=["the gateway cannot open", "lacre is light"],
)
def test_what_an_import_does_not_bring(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; found = {absent} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


LOCKS = [*(ROOT / "requirements").glob("*.lock"), *(ROOT / "tests/ecosystem").glob("*.lock")]


def test_locks_name_no_index_and_no_litellm() -> None:
    for lock in LOCKS:
        assert "litellm" not in lock.read_text()
        lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert not [line for line in lines if "://" in line or (line.lstrip().startswith("-") and "--hash=" not in line)], lock


SUPERVISOR = ROOT / "sdk/lacre/runtime/tasks.py"
# What starts a task or a thread that nobody watches. What a pool runs is fine where it is awaited on the spot.
UNWATCHED = {
    "create_task", "ensure_future", "TaskGroup", "gather", "as_completed", "run_coroutine_threadsafe", "run_in_executor",
    "Thread", "Timer", "start_new_thread", "set_task_factory",
}  # fmt: skip


def unwatched(source: str) -> Iterator[str]:
    """How a file reaches for background work of its own, whatever it calls it on or imports it as."""
    tree = ast.parse(source)
    awaits = (node.value for node in ast.walk(tree) if isinstance(node, ast.Await))
    awaited = {id(value.func) for value in awaits if isinstance(value, ast.Call)}
    for node in ast.walk(tree):
        found: set[str] = set()
        if isinstance(node, ast.Attribute) and node.attr == "run_in_executor" and id(node) in awaited:
            continue
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "tasks.Thread":  # the supervisor's own
            found = UNWATCHED & {node.attr}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name for alias in node.names}
            watched = module.partition(".")[0] in ("asyncio", "threading")
            found = UNWATCHED & names if watched else {"_thread"} & {module, *names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("shield") and isinstance(node.args[0], ast.Call):
            found = {"shield, which makes a task of a coroutine"}
        yield from (f"line {node.lineno}: {name}" for name in found)


@pytest.mark.parametrize("package", rooms.PACKAGES)
def test_the_supervisor_alone_starts_background_work(package: str) -> None:
    found = {path: list(unwatched(path.read_text())) for path in files(package) if path != SUPERVISOR}
    assert not {path: places for path, places in found.items() if places}, "start it by `lacre.runtime.tasks`"


def test_the_supervisor_needs_errors_alone_of_ours() -> None:
    assert {name for name in imports(SUPERVISOR) if name.startswith("lacre")} == {"lacre.errors.LacreError"}


@pytest.mark.parametrize(
    "source",
    [
        "asyncio.create_task(x())", "from asyncio import create_task as begin", "asyncio.get_running_loop().create_task(x())",
        "begin = loop.create_task", "asyncio.ensure_future(x())",
        "async def f():\n    async with asyncio.TaskGroup() as group: ...", "threading.Thread(target=x).start()",
        "from threading import Thread", "threading.Timer(1, x).start()", "import _thread",
        "from _thread import start_new_thread as begin", "asyncio.gather(x(), y())", "loop.run_in_executor(None, x)",
        "asyncio.shield(x())",
    ],
)  # fmt: skip
def test_unwatched_work_is_found(source: str) -> None:
    assert list(unwatched(source))


# Names


WORD = re.compile(r"[A-Za-z_]\w*")
# Names that several classes share, where each is, and why a reader is not misled.
DOORS = "sdk/lacre/client/{0}.py sdk/lacre/direct/{0}.py sdk/lacre/legacy/{0}.py"
OF_BOTH = "sdk/lacre/errors.py sdk/lacre/legacy/messages.py"
SHARED = {
    ("Client", DOORS.format("_sync")): "the public doors: one client for each way in",
    ("AsyncClient", DOORS.format("_async")): "as `Client`, for asyncio",
    ("TimedOut", OF_BOTH): "the same error: legacy's is a subclass that is httpx's too",
    ("Unreachable", OF_BOTH): "as `TimedOut`",
}
# What nothing of ours calls, and why it stays.
UNCALLED = {
    "encode_request_indeterminate": "a form that other senders use (RFC 9292 section 3.2), and that the wire must open",
    "unexplained": "for callers of `reply.recount()`",
}


def homonyms(sources: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """sources: paths with their text. Each public name that has several classes, with their paths."""
    places = defaultdict(list)
    for path, source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return {(name, " ".join(sorted(paths))) for name, paths in places.items() if len(paths) > 1}


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


def test_one_word_has_one_meaning_and_is_used() -> None:
    """What only tests use belongs to the tests."""
    sources = {str(path.relative_to(ROOT)): path.read_text() for package in rooms.PACKAGES for path in files(package)}
    assert len(sources) > 300
    found = homonyms(sources.items())
    assert found - SHARED.keys() == set(), "rename one of each, or say in SHARED why they mean the same"
    assert SHARED.keys() - found == set(), "these no longer share a name: take them out of SHARED"
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    left = unused(sources.values(), (path.read_text() for path in documents))
    assert left == UNCALLED.keys(), "delete these, move them to the tests, or say in UNCALLED why they stay"


def test_homonyms_and_unused_names_are_seen() -> None:
    classes = "class One: ...\nclass _Two: ...\n"
    assert homonyms([("a.py", f"{classes}if True:\n    class Three: ...\n"), ("b.py", classes)]) == {("One", "a.py b.py")}
    one = '"""helped"""\nLIMIT = 1\ndef helped(): ...\nclass Kept:\n    def helps(self): ...\n    def told(self): ...\n'
    assert unused([one, "from one import LIMIT, Kept\n"], ["call `told`"]) == {"helped", "helps"}


# The import picture of `tools/rooms.py`: few rooms, in floors, without circles, each with a front that says where to begin

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
        ({f"room{number}.py": "" for number in range(30)}, "30 rooms, at most 21"),
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
PARTS = {package.folder: f"{package.folder}/{name}" for name, package in rooms.PACKAGES.items()}


def named() -> list[tuple[str, str, str]]:
    """The files that docs/architecture.md names in its tables of rooms: package, the row's rooms, file."""
    found, package = [], ""
    for line in PAGE.splitlines():
        if (heading := re.match(r"\*\*(.+?)\*\*", line)) is not None:
            package = PARTS.get(heading[1].lower(), "")
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
