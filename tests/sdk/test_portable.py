"""What the SDK needs of its platform: it imports where there is no POSIX, and says what to set where it finds no home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lacre
from lacre.runtime import folders

# What third parties import for this platform is imported first. From then on, neither the modules that Windows lacks nor the
# names that its `os` and `signal` lack are there for the SDK.
WITHOUT_POSIX = """
import builtins, importlib, os, pkgutil, signal, sys, tempfile
import anyio, asyncio, filelock, httpx, httpx2, httptools, openai, platformdirs, prompt_toolkit, rich.live, rich.markdown
import prompt_toolkit.history, starlette.applications, starlette.middleware.cors, starlette.responses, typer, uvicorn
absent = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty", "uvloop"}
for module, names in {os: "O_CLOEXEC O_NOFOLLOW O_DIRECTORY fchmod fork getuid geteuid getegid getgroups killpg",
                      signal: "SIGHUP SIGKILL SIGUSR1 SIGPIPE"}.items():
    for name in names.split():
        delattr(module, name)
ours, real = [], builtins.__import__
def limited(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__") or ""
    if importer.partition(".")[0] == "lacre" and name.partition(".")[0] in absent:
        raise ModuleNotFoundError(f"{importer} imports {name}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = limited
import lacre
for found in pkgutil.walk_packages(lacre.__path__, "lacre."):
    if found.name != "lacre.__main__":
        importlib.import_module(found.name)
        ours.append(found.name)
assert len(ours) > 60, ours
lacre.VersionFile.default()
"""


def test_everything_imports_without_posix() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT_POSIX], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def where(**variables: str) -> str:
    code = (
        "from lacre import LacreError\nfrom lacre.runtime import folders\n"
        "try: print(folders.state())\nexcept LacreError as exc: print(exc)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_STATE_HOME")}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=clean | variables).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of the XDG specification")
@pytest.mark.parametrize("relative", ["", " ", "state", "./state", "~/state"])
def test_a_relative_state_home_is_ignored(relative: str) -> None:
    assert where(HOME="/home/ada", XDG_STATE_HOME=relative) == "/home/ada/.local/state/lacre"
    assert where(HOME="/home/ada", XDG_STATE_HOME="/srv/state") == "/srv/state/lacre"


@pytest.mark.parametrize("path", ["", "a\0b", "\ud83d", b"a", None, 5])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises(lacre.UsageError):
        folders.given(path, "folder")


def test_a_home_that_is_not_there() -> None:
    with pytest.raises(lacre.SettingsError, match="no such home folder"):
        folders.expanded(Path("~nobody-of-this-name/x"))
