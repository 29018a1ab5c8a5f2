"""Both distributions, installed from their wheels by pip, on every declared Python that is here.

Each environment is new, and sees the locked packages of one of tools/environments.py. pip has no index: what the wheels ask for
must be among those, or the installation fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import dist
import environments
from lacre import __version__

FOUND = {".".join(path.name.removeprefix("python").split(".")[:2]): path for path in environments.pythons()}
SERVERS = {"lacre_fabric", "lacre_gateway", "lacre_backend"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make dist` builds them, from the working tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    dist.export(tree)
    dist.build(tree, out, dist.source().epoch)
    return out


def wheel(wheels: Path, name: str) -> Path:
    return wheels / f"{name}-{__version__}-py3-none-any.whl"


def metadata(wheels: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel(wheels, name)) as packed:
        return HeaderParser().parsestr(packed.read(f"{name}-{__version__}.dist-info/METADATA").decode())


def installed(folder: Path, wheels: Path, version: str, lock: str, wanted: str) -> Path:
    """The folder of a new environment with `wanted` in it. Skips where this machine has no such Python."""
    if version not in FOUND:
        pytest.skip(f"Python {version} is not installed")
    locked = environments.ready(lock, FOUND[version])
    subprocess.run([FOUND[version], "-m", "venv", "--without-pip", folder], check=True)
    (packages(folder) / "locked.pth").write_text(f"{packages(locked.parents[1])}\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-compile"]
    run([*pip, "--no-index", "--find-links", wheels, wanted], PIP_CONFIG_FILE=os.devnull)
    return folder


def packages(environment: Path) -> Path:
    [found] = environment.glob("lib/python3*/site-packages")
    return found


def run(command: list[str | Path], **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(command, check=False, env=env | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Imports every module of the SDK that needs no extra, where the modules that only Unix has cannot be imported.
EVERYWHERE = """
import importlib, importlib.abc, json, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    NAMES = {"fcntl", "grp", "pwd", "resource", "termios", "tty"}

    def find_spec(self, name, path, target=None):
        if name in self.NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for name in Missing.NAMES:
    sys.modules.pop(name, None)
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is there all the same")
import lacre

lacre.Client, lacre.AsyncClient
top = pathlib.Path(lacre.__file__).parent
names = [".".join(path.relative_to(top.parent).with_suffix("").parts) for path in sorted(top.rglob("*.py"))]
extras = {"httptools", "httpx", "markdown_it", "openai", "prompt_toolkit", "rich", "starlette", "typer", "uvicorn"}
imported = []
for name in [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]:
    try:
        importlib.import_module(name)
    except (ImportError, SystemExit) as exc:
        if getattr(exc.__cause__ or exc, "name", None) not in extras:
            raise
    else:
        imported.append(name)
print(json.dumps(imported))
"""


@pytest.mark.parametrize("version", environments.DECLARED)
def test_the_sdk_and_nothing_of_the_servers(wheels: Path, tmp_path: Path, version: str) -> None:
    home = installed(tmp_path / "sdk", wheels, version, "sdk", "lacre")
    python = home / "bin/python"
    code = "import lacre, sys; print(lacre.__version__, lacre.__file__, '%d.%d' % sys.version_info[:2])"
    ours = packages(home)
    assert run([python, "-P", "-W", "error", "-c", code]).split() == [__version__, str(ours / "lacre/__init__.py"), version]
    assert {path.name for path in ours.iterdir()} == {"lacre", f"lacre-{__version__}.dist-info", "locked.pth"}
    assert (ours / "lacre/py.typed").exists()
    code = f"from importlib.util import find_spec; print([name for name in {SERVERS} if find_spec(name)])"
    assert run([python, "-P", "-c", code]).strip() == "[]"
    everywhere = json.loads(run([python, "-P", "-W", "error", "-c", EVERYWHERE]))
    assert "lacre.client" in everywhere
    assert len(everywhere) > 30


@pytest.mark.parametrize("version", environments.DECLARED)
def test_a_gateway_by_the_extra_of_the_sdk(wheels: Path, tmp_path: Path, version: str) -> None:
    home = installed(tmp_path / "gateway", wheels, version, "gateway", "lacre[gateway]")
    ours = packages(home)
    assert {path.name for path in ours.iterdir() if path.is_dir()} == SERVERS | {
        "lacre", f"lacre-{__version__}.dist-info", f"lacre_server-{__version__}.dist-info",
    }  # fmt: skip
    assert all((ours / name / "py.typed").exists() for name in SERVERS)
    lacre = home / "bin/lacre"
    told = run([lacre, "--help"], COLUMNS="200")
    commands = set(re.findall(r"^\W*(\w+) ", told, re.MULTILINE))
    assert {"chat", "fabric", "gateway", "policy"} <= commands
    assert "worker" not in commands, "its extra is not installed"
    assert "--settings" in run([lacre, "gateway", "--help"], COLUMNS="200")
    run([lacre, "policy", "test"])


def test_every_extra_of_the_servers_is_there_at_the_same_version(wheels: Path) -> None:
    """No other pair of versions can be installed."""
    sdk, server = metadata(wheels, "lacre"), metadata(wheels, "lacre_server")
    assert sdk["Version"] == server["Version"] == __version__
    asked = [each for each in sdk.get_all("Requires-Dist", []) if each.startswith("lacre-server")]
    extras = [re.fullmatch(rf"lacre-server\[([\w-]+)\]=={re.escape(__version__)}; extra == '\1'", each) for each in asked]
    assert None not in extras, asked
    named = {found[1] for found in extras if found}
    assert {"gateway", "backend", "fabric", "all", "tracing", "model", "kms-aws"} <= named
    assert named == set(server.get_all("Provides-Extra", []))
    pins = [each for each in server.get_all("Requires-Dist", []) if re.match(r"lacre\b", each)]
    assert f"lacre=={__version__}" in [each.replace("[cli]", "") for each in pins]


@pytest.mark.parametrize("name", ["lacre", "lacre_server"])
def test_what_a_wheel_says_of_itself(wheels: Path, name: str) -> None:
    found = metadata(wheels, name)
    assert found["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert len(str(found.get_payload())) > 500, "a readme"
    with zipfile.ZipFile(wheel(wheels, name)) as packed:
        assert f"{name}-{__version__}.dist-info/licenses/LICENSE" in packed.namelist()


def test_one_licence() -> None:
    assert (dist.ROOT / "sdk/LICENSE").read_bytes() == (dist.ROOT / "LICENSE").read_bytes()
