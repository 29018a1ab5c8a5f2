"""A browser that only notes how it was called, and what is in the file that it was given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from parts.waiting import PATIENCE, wait_until


@dataclass(frozen=True, slots=True)
class Call:
    """arguments: of the program, which every user of the machine can read. page: what the file had, with this mode."""

    arguments: str
    mode: str
    page: str


@dataclass(frozen=True, slots=True)
class LinkBrowser:
    folder: Path

    def env(self) -> dict[str, str]:
        """Of a program that opens it."""
        program = self.folder / "browser"
        program.write_text(
            f"#!{sys.executable} -P\nimport os, sys\nfrom urllib.request import url2pathname\n"
            f"path = url2pathname(sys.argv[1].removeprefix('file://'))\n"
            f"is_file = os.path.isfile(path)\n"
            f"text = repr(sys.argv) + '\\n' + (oct(os.stat(path).st_mode) + '\\n' + open(path).read() if is_file else '\\n')\n"
            f"open({str(self._seen)!r} + '~', 'w').write(text)\nos.rename({str(self._seen)!r} + '~', {str(self._seen)!r})\n"
        )
        program.chmod(0o700)
        return {"BROWSER": f"{program} %s", "DISPLAY": ":0"}

    def called(self) -> Call:
        """Waits for it."""
        wait_until(self._seen.exists, PATIENCE)
        return Call(*self._seen.read_text().split("\n", 2))

    @property
    def _seen(self) -> Path:
        return self.folder / "seen"
