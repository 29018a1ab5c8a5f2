"""A terminal that tests type into and read: tmux."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from parts.up import LACRE

TMUX = shutil.which("tmux")


class Screen:
    """A command in a terminal of its own, in tmux. home: a folder for its socket."""

    def __init__(self, home: Path) -> None:
        self.socket = str(home / "tmux")

    def tmux(self, *arguments: str, check: bool = True, **options: Any) -> str:
        command = [str(TMUX), "-S", self.socket, *arguments]
        return subprocess.run(command, check=check, capture_output=True, text=True, **options).stdout

    def start(self, variables: dict[str, str], *arguments: str) -> None:
        """arguments: of `lacre`."""
        line = shlex.join([*LACRE, *arguments]) + "; echo ended with $?; sleep 100"
        variables |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "110", "-y", "40", line, env=variables)

    def start_chat(self, variables: dict[str, str], *options: str) -> None:
        """And waits for its first prompt."""
        self.start(variables, "chat", *options)
        self.wait_for(r"\n>\s*\n")

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def end(self) -> None:
        self.keys("C-d")
        self.wait_for("ended with 0")

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, shown := self.tmux("capture-pane", "-p")):
            assert time.monotonic() < deadline, f"{pattern!r} is not on the screen:\n{shown}"
            time.sleep(0.05)
        return shown
