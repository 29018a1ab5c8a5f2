"""Imports point one way, and the SDK stays light: the rules of the house, checked on every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"lacre": "sdk", "lacre_fabric": "fabric", "lacre_gateway": "gateway", "lacre_backend": "backend"}
MAY_IMPORT = {
    "lacre": {"lacre"},
    "lacre_fabric": {"lacre", "lacre_fabric"},
    "lacre_gateway": {"lacre", "lacre_fabric", "lacre_gateway"},
    "lacre_backend": {"lacre", "lacre_fabric", "lacre_backend"},
}
# What a relay may read. The gateway never holds a pool's private key, and never has the code to use one.
# Of `padding`: how long padded messages are, no keys.
OF_WIRE_FOR_GATEWAY = {
    "lacre.wire.header",
    "lacre.wire.outer",
    "lacre.wire.padding",
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports; `from a import b` counts as `a.b`, for b may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / ROOMS[package] / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_one_way(package: str) -> None:
    for path in files(package):
        used = {name.partition(".")[0] for name in imports(path)}
        assert used & set(ROOMS) <= MAY_IMPORT[package], path


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
                assert any(name == allowed or name.startswith(allowed + ".") for allowed in OF_WIRE_FOR_GATEWAY), (
                    f"{path}: {name}"
                )


def test_the_gateway_cannot_come_by_the_opening_code() -> None:
    """Not even through what it imports from elsewhere."""
    code = "import sys, lacre_gateway.app, lacre_gateway.relay.relay; assert 'lacre.wire.opening' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_lacre_is_light() -> None:
    code = (
        "import sys, lacre\n"
        "heavy = {'fastapi', 'nats', 'llama_cpp', 'openai', 'pydantic', 'typer', 'rich', 'starlette', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOCKS = [*(ROOT / "requirements").glob("*.lock"), *(ROOT / "tests/ecosystem").glob("*.lock")]


def test_no_litellm() -> None:
    for lock in LOCKS:
        assert "litellm" not in lock.read_text()


def test_locks_name_no_index() -> None:
    for lock in LOCKS:
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
    awaited = {
        id(node.value.func) for node in ast.walk(tree) if isinstance(node, ast.Await) and isinstance(node.value, ast.Call)
    }
    for node in ast.walk(tree):
        found: set[str] = set()
        if isinstance(node, ast.Attribute) and node.attr == "run_in_executor" and id(node) in awaited:
            continue
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "tasks.Thread":  # the supervisor's own
            found = UNWATCHED & {node.attr}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name for alias in node.names}
            found = (
                UNWATCHED & names if module.partition(".")[0] in ("asyncio", "threading") else {"_thread"} & {module, *names}
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("shield") and isinstance(node.args[0], ast.Call):
            found = {"shield, which makes a task of a coroutine"}
        yield from (f"line {node.lineno}: {name}" for name in found)


@pytest.mark.parametrize("package", ROOMS)
def test_the_supervisor_alone_starts_background_work(package: str) -> None:
    found = {path: list(unwatched(path.read_text())) for path in files(package) if path != SUPERVISOR}
    assert not {path: places for path, places in found.items() if places}, "start it by `lacre.runtime.tasks`"


def test_the_supervisor_needs_errors_alone_of_ours() -> None:
    assert {name for name in imports(SUPERVISOR) if name.startswith("lacre")} == {"lacre.errors.LacreError"}


@pytest.mark.parametrize(
    "source",
    [
        "asyncio.create_task(x())",
        "from asyncio import create_task as begin",
        "asyncio.get_running_loop().create_task(x())",
        "begin = loop.create_task",
        "asyncio.ensure_future(x())",
        "async def f():\n    async with asyncio.TaskGroup() as group: ...",
        "threading.Thread(target=x).start()",
        "from threading import Thread",
        "threading.Timer(1, x).start()",
        "import _thread",
        "from _thread import start_new_thread as begin",
        "asyncio.gather(x(), y())",
        "loop.run_in_executor(None, x)",
        "asyncio.shield(x())",
    ],
)
def test_unwatched_work_is_found(source: str) -> None:
    assert list(unwatched(source))
