"""Runs llama.cpp's converter in an environment of its own, because it needs PyTorch.

Rules:
- The converter comes from the source archive of the locked llama-cpp-python. Its digest is checked before its code runs.
- The child sees no variable of ours, downloads nothing, and gets a draft's path alone to write to.
- Its long complaints become one sentence, with what to do.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import IO, Final

import platformdirs

from lacre.errors import SettingsError
from lacre_backend.workshop.child import Report

# As in requirements/native.lock; a test compares them.
VERSION: Final = "0.3.36"
ARCHIVE: Final = f"llama_cpp_python-{VERSION}.tar.gz"
DIGEST: Final = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SCRIPT: Final = "convert_hf_to_gguf.py"
ADAPTER_SCRIPT: Final = "convert_lora_to_gguf.py"
PACKAGES: Final = ("torch", "transformers", "safetensors", "sentencepiece", "protobuf")
_NEEDED: Final = ("torch", "transformers")  # others only for some models: the converter names them
_SCRIPTS: Final = "|".join(map(re.escape, (SCRIPT, ADAPTER_SCRIPT)))
_MEMBER: Final = re.compile(rf"[^/]+/vendor/llama\.cpp/({_SCRIPTS}|conversion/[^/]+\.py|gguf-py/gguf/.+\.py)")
_KEPT: Final = 400  # lines of the converter's output: a traceback and the warnings before it
_LONGEST: Final = 2000  # characters of a line that are kept; it prints whole chat templates
_TOLD: Final = 300  # characters of its last words
_WRITING: Final = re.compile(r"Writing:\s+(\d+)%")
_UNKNOWN_MODEL: Final = re.compile(r"Model (\S+) is not supported|Architecture '?([^\s']+)'? not supported")
_CHECKSUM: Final = re.compile(r"chkhsh:\s+([0-9a-f]{12,64})")
_NO_MODULE: Final = re.compile(r"No module named '([\w.]+)'")
_ERROR: Final = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*|ERROR:.*")


@dataclass(frozen=True, slots=True)
class ConverterPlace:
    """python: the interpreter of the environment. sources: the archive, or an unpacked folder of llama.cpp."""

    python: Path
    sources: Path


def home() -> Path:
    """Where the environment is expected if no option names it."""
    return platformdirs.user_cache_path("lacre", appauthor=False) / "converter"


def place(python: Path | None, sources: Path | None, *more: str) -> ConverterPlace:
    """Checks that everything is there. more: packages that the work needs too. Raises SettingsError, which says how to get what
    is missing.
    """
    found = ConverterPlace(python or home() / "bin" / "python", sources or home() / ARCHIVE)
    advice = recipe(found, *more)
    if not os.access(found.python, os.X_OK):
        raise SettingsError(
            f"The converter needs PyTorch, in an environment of its own. There is none at {found.python}.\n{advice}"
        )
    absent = _absent(found.python, *more)
    if absent:
        raise SettingsError(f"{found.python} has no {' and no '.join(absent)}, which the converter needs.\n{advice}")
    if not found.sources.exists():
        raise SettingsError(f"The converter itself is missing: {found.sources} does not exist.\n{advice}")
    return found


def recipe(wanted: ConverterPlace, *more: str) -> str:
    """The commands that make the environment and fetch the converter."""
    python, folder = shlex.quote(str(wanted.python)), shlex.quote(str(wanted.sources.parent))
    source = f"--no-deps --no-binary llama-cpp-python llama-cpp-python=={VERSION}"
    lines = [
        "Make it once, with about 2 GB of disk:",
        f"  python3 -m venv {shlex.quote(str(wanted.python.parents[1]))}",
        f"  {python} -m pip install {' '.join((*PACKAGES, *more))}",
        f"  {python} -m pip download {source} --dest {folder}",
        "To use another environment, give its interpreter with --python.",
    ]
    return "\n".join(lines)


def _absent(python: Path, *more: str) -> list[str]:
    code = "import sys; from importlib.util import find_spec; print(*(n for n in sys.argv[1:] if find_spec(n) is None))"
    try:
        done = subprocess.run(
            [python, "-P", "-c", code, *_NEEDED, *more],
            check=False,
            capture_output=True,
            text=True,
            env=surroundings(),
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode != 0:
        raise SettingsError(f"{python} is no Python interpreter that runs. Give one with --python.")
    return done.stdout.split()


def surroundings(*search: Path) -> dict[str, str]:
    """The child's environment. search: folders of modules. Nothing is downloaded."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
    return kept | ours | {"PYTHONPATH": os.pathsep.join(map(str, search))}


@contextmanager
def unpacked(sources: Path) -> Iterator[Path]:
    """The folder with the converter's script. Raises SettingsError, or OSError."""
    if sources.is_dir():
        if not (sources / SCRIPT).is_file():
            raise SettingsError(f"{sources} has no {SCRIPT}. Give a folder of llama.cpp, or leave --sources away.")
        yield sources
        return
    with sources.open("rb") as archive:
        if file_digest(archive, "sha256").hexdigest() != DIGEST:
            raise SettingsError(f"{sources} is not the archive of llama-cpp-python {VERSION}. Delete it and download it again.")
    with tempfile.TemporaryDirectory(prefix="lacre-converter-") as folder:
        with tarfile.open(sources) as archive_files:
            for member in archive_files:
                if (matched := _MEMBER.fullmatch(member.name)) and (data := archive_files.extractfile(member)):
                    _write(Path(folder), matched[1], data)
        yield Path(folder)


def _write(folder: Path, name: str, data: IO[bytes]) -> None:
    path = folder.joinpath(*(part for part in name.split("/") if part != ".."))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(data, file)


def convert(python: Path, code: Path, options: Sequence[str], report: Report, *, script: str = SCRIPT) -> None:
    """Runs the converter. code: of `unpacked`. Raises SettingsError with its reason, made short."""
    if not (code / script).is_file():
        raise SettingsError(f"{code} has no {script}. Give a folder of llama.cpp, or leave --sources away.")
    command: list[str | Path] = [python, "-P", code / script, *options]
    lines: deque[str] = deque(maxlen=_KEPT)
    search = surroundings(code, code / "gguf-py")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=search
    ) as child:
        try:
            for line in _lines(child.stdout):
                lines.append(line)
                if written := _WRITING.search(line):
                    report("converting", int(written[1]) / 100)
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise SettingsError(reason(python, child.returncode, lines))


def _lines(output: IO[bytes] | None) -> Iterator[str]:
    """Progress bars end their lines with a carriage return."""
    rest = b""
    while output is not None and (piece := os.read(output.fileno(), 65536)):
        *whole, rest = re.split(rb"[\r\n]", (rest + piece)[-2 * 65536 :])
        for line in whole:
            yield line.decode("utf-8", "replace")[:_LONGEST]
    yield rest.decode("utf-8", "replace")[:_LONGEST]


def reason(python: Path, code: int, lines: Sequence[str]) -> str:
    """What the converter's output comes to, and what to do."""
    text = "\n".join(lines)
    if unknown := _UNKNOWN_MODEL.search(text):
        name = unknown[1] or unknown[2]
        return (
            f"The converter of llama.cpp knows no architecture {name}. Nothing was written. Another server may run the model: "
            "see docs/upstream.md."
        )
    if "pre-tokenizer was not recognized" in text:
        found = _CHECKSUM.search(text)
        return (
            f"The converter of llama.cpp does not know this model's pre-tokenizer (checksum {found[1] if found else '?'}). "
            "Without it, texts become other tokens. Nothing was written. Check that tokenizer.json is the publisher's own."
        )
    if module := _NO_MODULE.search(text):
        name = module[1]
        return f"The converter needs the package {name}. Install it: {python} -m pip install {name}. Nothing was written."
    if code == -9:
        return "The converter was killed: the machine may have too little memory. Nothing was written. Use a larger machine."
    last = next((line.strip() for line in reversed(lines) if _ERROR.match(line.strip())), f"exit code {code}")
    return f"The converter failed: {last[-_TOLD:]}. Nothing was written. Check that the folder is whole."
