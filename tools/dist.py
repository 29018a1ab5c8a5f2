"""Makes `dist/`: wheel, source distribution and SBOM of `lacre` and of `lacre-server`; provenance, checksums, a signature.

Rules:
- The same commit, tools and key give the same bytes. So no clock is read: every time is the commit's.
- What git does not track is not in it. A tree with changes that are not committed is refused, unless --allow-dirty.
- A wheel is built from the source distribution, so each of those is known to build.
- A key is a file that only its owner can read. It is named by $DIST_KEY; its content is in no argument, message or output.

docs/releasing.md says how to use it, and how to verify what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

import bootstrap
from attestation import key_id, seal, statement
from verify_dist import NAMESPACE, PROVENANCE_SUFFIX, SIGNATURE, SIGNER, SIGNERS, SUMS, read_sums, verify

ROOT: Final = Path(__file__).resolve().parent.parent
# What the provenance says of itself. docs/releasing.md describes them.
BUILD_TYPE: Final = "urn:lacre:dist:v1"
LOCAL_BUILDER: Final = "urn:lacre:dist:local"
COMMAND: Final = "make dist"
GENERATOR: Final = ROOT / "build" / "container" / "bin" / "cyclonedx-py"


@dataclass(frozen=True, slots=True)
class Project:
    """One distribution. name: as in its files' names. folder: its pyproject.toml's. locks: what its SBOM lists."""

    name: str
    folder: str
    locks: tuple[str, ...]
    needs: tuple[str, ...] = ()


PROJECTS: Final = (
    Project("lacre", "sdk", ("sdk.lock",)),
    Project("lacre_server", ".", ("server.lock", "native.lock"), needs=("lacre",)),
)


@dataclass(frozen=True, slots=True)
class Source:
    """commit: the id of HEAD. epoch: its time, in seconds. changes: the paths that differ from it."""

    commit: str
    epoch: int
    changes: tuple[str, ...]


def source() -> Source:
    commit, epoch = _git("log", "-1", "--format=%H %ct").split()
    changed = _git("diff", "--name-only", "--no-renames", "-z", "HEAD")
    added = _git("ls-files", "-z", "--others", "--exclude-standard")
    return Source(commit, int(epoch), tuple(sorted({*changed.split("\0"), *added.split("\0")} - {""})))


def export(tree: Path) -> None:
    """Copies what git tracks, and what it would if it were added, as it is in the working tree."""
    for name in sorted(set(_git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")) - {""}):
        if (ROOT / name).is_file():  # one that was removed and not committed is still listed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout


def build(tree: Path, out: Path, epoch: int) -> None:
    """Both source distributions from a tree, and both wheels from those."""
    for project in PROJECTS:
        _hatchling("sdist", tree / project.folder, out, epoch)
        [archive] = out.glob(f"{project.name}-*.tar.gz")
        with tempfile.TemporaryDirectory() as unpacked, tarfile.open(archive) as packed:
            packed.extractall(unpacked, filter="data")
            _hatchling("wheel", Path(unpacked) / archive.name.removesuffix(".tar.gz"), out, epoch)


def _hatchling(target: str, folder: Path, out: Path, epoch: int) -> None:
    env = {"PATH": os.environ.get("PATH", ""), "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1"}
    command: list[str | Path] = [sys.executable, "-P", "-m", "hatchling", "build", "--target", target, "--directory", out]
    done = subprocess.run(command, check=False, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"hatchling does not build the {target} of {folder.name}:\n{done.stdout}{done.stderr}")


def sbom(project: Project, tree: Path, out: Path, epoch: int) -> None:
    """CycloneDX: the locked packages that the distribution and its extras need, and which files it is about."""
    [wheel] = out.glob(f"{project.name}-*.whl")
    version = wheel.name.split("-")[1]
    lock = "".join((tree / "requirements" / name).read_text() for name in project.locks)
    about_it = tree / project.folder / "pyproject.toml"
    command: list[str | Path] = [GENERATOR, "requirements", "--pyproject", about_it, "--output-reproducible", "-"]
    env = {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, input=lock, env=env, capture_output=True, text=True)
    bom: dict[str, Any] = json.loads(done.stdout)
    about = bom["metadata"]["component"]
    about |= {"version": version, "purl": f"pkg:pypi/{about['name']}@{version}"}
    about["externalReferences"] = [
        {"type": "distribution", "url": path.name, "hashes": [{"alg": "SHA-256", "content": _digest(path)}]}
        for path in sorted(out.glob(f"{project.name}-*"))
    ]
    for name in project.needs:  # its other half has no line in a lock
        purl = f"pkg:pypi/{name}@{version}"
        bom["components"].append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    (out / f"{project.name}-{version}.cdx.json").write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")


def provenance(of: Source, tree: Path, digests: Mapping[str, str]) -> bytes:
    """An in-toto statement with SLSA provenance v1 of the files. No times: those would differ from one run to the next."""
    origin: dict[str, Any] = {"name": "source", "digest": {"dirHash": _dir_hash(tree)}}
    if not of.changes:
        origin["digest"]["gitCommit"] = of.commit
    locks = [f"requirements/{name}" for name in ("build.lock", "container.lock", *(n for p in PROJECTS for n in p.locks))]
    tools = _closure("hatchling")
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "command": COMMAND,
                "commit": of.commit,
                "uncommitted": " ".join(of.changes) or "none",
            },
            "internalParameters": {"SOURCE_DATE_EPOCH": str(of.epoch)},
            "resolvedDependencies": [
                origin,
                *({"name": name, "digest": {"sha256": _digest(tree / name)}} for name in locks),
                *({"uri": f"pkg:pypi/{name}@{tools[name]}"} for name in sorted(tools)),
            ],
        },
        "runDetails": {
            "builder": {
                "id": os.environ.get("DIST_BUILDER") or LOCAL_BUILDER,
                # Compressed bytes depend on zlib.
                "version": {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION},
            }
        },
    }
    return statement(digests, predicate)


def _closure(name: str) -> dict[str, str]:
    """The versions of an installed package and of all that it needs, by name."""
    found: dict[str, str] = {}
    todo = [name]
    while todo:
        try:
            package = distribution(todo.pop())
        except PackageNotFoundError:  # needed on other Pythons or platforms
            continue
        if package.name not in found:
            found[package.name] = package.version
            todo += [re.split(r"[^\w.-]", each)[0] for each in package.requires or () if "extra ==" not in each]
    return found


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _dir_hash(tree: Path) -> str:
    """The `dirHash` of in-toto's digest_set.md: of `sha256sum`'s lines for all files, sorted by path."""
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    return sha256("".join(f"{_digest(tree / path)}  {path}\n" for path in paths).encode()).hexdigest()


@contextmanager
def signing_key(path: Path | None) -> Iterator[tuple[Path, Ed25519PrivateKey]]:
    """The key in the file. None: one that exists for this run alone."""
    if path is not None:
        yield path, read_key(path)
        return
    print(
        "No DIST_KEY: signed by a development key that this run made and forgets.\n"
        "It shows that the files belong together, and nothing about who built them.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as folder:
        key = Ed25519PrivateKey.generate()
        kept = Path(folder) / "key"
        with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        yield kept, key


def read_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 key as `ssh-keygen -t ed25519` writes it. One key signs two formats: each begins with a name of its own."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SystemExit(f"{path} can be read by others: chmod 600 it")
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as exc:  # TypeError: it has a passphrase
        raise SystemExit(f"{path} is no OpenSSH key without a passphrase: see docs/releasing.md") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise SystemExit(f"{path} is not an Ed25519 key: make one with ssh-keygen -t ed25519")
    return key


def sign(out: Path, key_file: Path, key: Ed25519PrivateKey) -> None:
    """Writes the checksums, their signature and the line for `allowed_signers`."""
    sums = "".join(f"{_digest(path)}  {path.name}\n" for path in sorted(out.iterdir()))
    (out / SUMS).write_text(sums)
    command: list[str | Path] = ["ssh-keygen", "-q", "-Y", "sign", "-f", key_file, "-n", NAMESPACE, out / SUMS]
    subprocess.run(command, check=True, capture_output=True)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    (out / SIGNERS).write_text(f'{SIGNER} namespaces="{NAMESPACE}" {public}\n')


def make(out: Path, key_path: Path | None, of: Source) -> None:
    """Everything into `out`, an empty folder."""
    with tempfile.TemporaryDirectory() as exported, signing_key(key_path) as (key_file, key):
        tree = Path(exported)
        export(tree)
        build(tree, out, of.epoch)
        for project in PROJECTS:
            sbom(project, tree, out, of.epoch)
        digests = {path.name: _digest(path) for path in out.iterdir()}
        [archive] = out.glob("lacre-*.tar.gz")
        name = archive.name.removesuffix(".tar.gz") + PROVENANCE_SUFFIX
        (out / name).write_bytes(seal(provenance(of, tree, digests), key))
        sign(out, key_file, key)
        verify(out, out / SIGNERS)
        print(f"signed by {key_id(key.public_key())}", file=sys.stderr)


def replace(out: Path, made: Path) -> None:
    """Replaces the files of an earlier run with the new ones, and touches no others."""
    if out.exists():
        others = {path.name for path in out.iterdir()} - {SUMS, SIGNATURE, SIGNERS}
        if (out / SUMS).exists():
            others -= set(read_sums((out / SUMS).read_text()))
        if others:
            raise SystemExit(
                f"{out} has files that `make dist` did not make, move them away first: {', '.join(sorted(others))}"
            )
        shutil.rmtree(out)
    shutil.move(made, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make wheels and source distributions for a release.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to make")
    parser.add_argument("--allow-dirty", action="store_true", help="build from a tree with changes that are not committed")
    given = parser.parse_args()
    of = source()
    if of.changes and not given.allow_dirty:
        raise SystemExit(f"commit first, for a release is of a commit: {' '.join(of.changes)}")
    key = Path(os.environ["DIST_KEY"]) if os.environ.get("DIST_KEY") else None
    bootstrap.add("container")  # which has what makes an SBOM
    out = given.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "dist"
        made.mkdir()
        make(made, key, of)
        replace(out, made)
    for path in sorted(out.iterdir()):
        print(path)


if __name__ == "__main__":
    main()
