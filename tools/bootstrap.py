"""Makes `.venv` ready: locked dependencies, llama-cpp-python built from source, both of the tree's distributions editable.

It runs on the standard library of any Python >= 3.11, and is silent and quick if nothing changed.

- A name after it, such as `fuzz`, also installs the packages of `requirements/NAME.lock`, which only some Makefile targets
  need.
- `projector` also installs llama-cpp-python with mtmd, for workers whose models read images.
- Packages that conflict with the rest (`APART`) get an environment of their own, `build/NAME`.
- The compiled llama-cpp-python wheel is kept outside the clone (`$XDG_CACHE_HOME/lacre/wheels`), because pip's own wheel cache
  ignores the CMake flags. The name of its folder covers everything that the binary depends on.
- `--wheel` prints that wheel's place, `--mtmd-wheel` that of the one with mtmd, and `--portable-wheel` that of the one for
  images, which runs on any machine. Each is built if it is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".ready"
LOCKS = ROOT / "requirements"
MAIN_LOCKS = ("base.lock", "build.lock", "model.lock", "native.lock")
# What the metadata of `lacre` and `lacre-server` is made from.
PROJECTS = ("pyproject.toml", "sdk/pyproject.toml", "sdk/hatch_build.py", "sdk/lacre/_version.py")
APART = frozenset({"container", "contract"})

# No multimodal build: it takes longer, and only a worker with a projector loads it.
CMAKE_ARGS = os.environ.get("LACRE_CMAKE_ARGS", "-DLLAVA_BUILD=OFF")
# Without videos, which mtmd would read through a program that it starts.
MTMD_ARGS = f"{CMAKE_ARGS} -DLLAVA_BUILD=ON -DMTMD_VIDEO=OFF"


def cpu() -> str:
    """What a GGML_NATIVE build depends on: the machine and its instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(lines)))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, env=env)


def pip(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    run(VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments, env=env)


def install(lock: str, *options: str, venv: Path = VENV) -> None:
    """Compiles nothing: each module is compiled when it is first imported, and most never are."""
    target = () if venv == VENV else ("--python", venv / "bin" / "python")
    pip(*target, "install", "--no-compile", "--require-hashes", "--no-deps", *options, "-r", LOCKS / lock)


def portable_flags() -> str:
    """Those of the Dockerfile, with which images for release are built."""
    match = re.search(r'^ARG CMAKE_ARGS="(.*)"$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit("the Dockerfile sets no CMAKE_ARGS")
    return match[1]


def native_wheel() -> Path:
    """The llama-cpp-python wheel for this machine: from the cache, or built now."""
    return built_wheel(CMAKE_ARGS, cpu(), minutes=6)


def mtmd_wheel() -> Path:
    """The same with mtmd."""
    return built_wheel(MTMD_ARGS, cpu(), minutes=8)


def built_wheel(flags: str, target: str, *, minutes: int) -> Path:
    """target: what the binary is for. minutes: what it takes on two cores."""
    lock = (LOCKS / "native.lock").read_text()
    match = re.search(r"^llama-cpp-python==(\S+)", lock, re.MULTILINE)
    if match is None:
        raise SystemExit("requirements/native.lock does not pin llama-cpp-python: run tools/lock.sh")
    version = match[1]
    key = digest(lock, (LOCKS / "build.lock").read_text(), flags, target, platform.machine(),
                 sysconfig.get_config_var("SOABI") or sys.version)  # fmt: skip
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_home / "lacre" / "wheels" / f"llama_cpp_python-{version}-{key}"
    for wheel in folder.glob("*.whl"):
        return wheel
    print(f"Building llama-cpp-python {version} with {flags}: once for this machine, about {minutes} minutes on 2 cores.",
          flush=True)  # fmt: skip
    began = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        env = os.environ | {
            "CMAKE_ARGS": flags,
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        pip("wheel", "--require-hashes", "--no-deps", "--no-build-isolation", "--no-cache-dir",
            "--no-binary", "llama-cpp-python", "-r", LOCKS / "native.lock", "-w", build, env=env)  # fmt: skip
        folder.mkdir(exist_ok=True)
        for wheel in build.glob("*.whl"):
            wheel.replace(folder / wheel.name)  # the same file system: another clone never sees half a wheel
    finally:
        shutil.rmtree(build, ignore_errors=True)
    print(f"Built in {time.monotonic() - began:.0f} s, kept in {folder}", flush=True)
    return next(folder.glob("*.whl"))


def add(name: str) -> None:
    """Installs one more lock file: into a `.venv` that is ready, or apart from it."""
    lock = LOCKS / f"{name}.lock"
    venv = ROOT / "build" / name if name in APART else VENV
    stamp = venv / f".{name}"
    wanted = digest(lock.read_text(), sys.version)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    try:
        if name in APART:
            run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv)
        install(lock.name, "--only-binary=:all:", venv=venv)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{lock.name} cannot be installed here: see requirements/{name}.in for what it needs") from error
    stamp.write_text(wanted)


def add_projector() -> None:
    """Pillow, and llama-cpp-python with mtmd in place of the one without."""
    add("projector")
    if next(VENV.glob("lib/*/site-packages/llama_cpp/lib/libmtmd.*"), None) is None:
        pip("install", "--no-deps", "--force-reinstall", mtmd_wheel())


def main() -> None:
    prepare()
    for name in sys.argv[1:]:
        match name:
            case "--wheel":
                print(native_wheel())
            case "--mtmd-wheel":
                print(mtmd_wheel())
            case "--portable-wheel":
                print(built_wheel(portable_flags(), "any", minutes=9))
            case "projector":
                add_projector()
            case _:
                add(name)


def prepare() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells an older Python so
        raise SystemExit(f"Lacre needs Python 3.11 or newer; this is {platform.python_version()}. Try: make PYTHON=python3.12")
    wanted = digest(*((LOCKS / name).read_text() for name in MAIN_LOCKS), *((ROOT / name).read_text() for name in PROJECTS),
                    Path(__file__).read_text(), CMAKE_ARGS, cpu(), sys.version, str(ROOT))  # fmt: skip
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        raise SystemExit("Lacre builds llama.cpp: install a C and C++ compiler first (Debian: apt-get install build-essential)")
    if importlib.util.find_spec("ensurepip") is None:
        raise SystemExit("Lacre needs Python's venv module: install it first (Debian: apt-get install python3-venv)")
    print("Setting up .venv: hash-locked dependencies from requirements/*.lock", flush=True)
    run(sys.executable, "-m", "venv", "--clear", VENV)
    install("build.lock")
    install("base.lock")
    install("model.lock")
    pip("install", "--no-deps", native_wheel())
    pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT / "sdk", "-e", ROOT)
    STAMP.write_text(wanted)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failed:
        command = " ".join(failed.cmd)
        raise SystemExit(f"Lacre is not set up: see above. This ended with status {failed.returncode}: {command}") from None
