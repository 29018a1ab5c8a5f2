"""Verifies a folder that `make dist` made: `python tools/verify_dist.py FOLDER --signers FILE`. docs/releasing.md says how.

FILE lists the keys that you trust, as ssh-keygen's `allowed_signers` does. Do not take it from the folder itself: anyone who
can replace a file there can replace a key beside it.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from attestation import AttestationError, open_envelope, read_statement

SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "SHA256SUMS.sig"
SIGNERS: Final = "allowed_signers"
PROVENANCE_SUFFIX: Final = ".intoto.jsonl"
# A signature that the same key made for another purpose, a git tag say, is none of these files'.
NAMESPACE: Final = "lacre-dist"
SIGNER: Final = "lacre-release"


class VerifyError(Exception):
    """A file of the folder differs from the signed one."""


@dataclass(frozen=True, slots=True)
class Verified:
    """digests: hex SHA-256 of each file by its name. predicate: the SLSA provenance of all of them."""

    digests: dict[str, str]
    predicate: dict[str, Any]


def verify(folder: Path, signers: Path) -> Verified:
    """Raises VerifyError or AttestationError."""
    _signature(folder, signers)
    listed = read_sums((folder / SUMS).read_text())
    found = {path.name for path in folder.iterdir()} - {SUMS, SIGNATURE, SIGNERS}
    if found != set(listed):
        raise VerifyError(f"{SUMS} and the folder differ: {', '.join(sorted(found ^ set(listed)))}")
    for name, digest in listed.items():
        if sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise VerifyError(f"{name} is not the file that was signed")
    provenance = [name for name in listed if name.endswith(PROVENANCE_SUFFIX)]
    if len(provenance) != 1:
        raise VerifyError(f"the folder has {len(provenance)} files of provenance, not one")
    subjects, predicate = read_statement(open_envelope((folder / provenance[0]).read_bytes(), list(_keys(signers))))
    if subjects != {name: digest for name, digest in listed.items() if name not in provenance}:
        raise VerifyError("the provenance is of other files")
    return Verified(listed, predicate)


def _signature(folder: Path, signers: Path) -> None:
    command: list[str | Path] = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", SIGNER, "-n", NAMESPACE]
    command += ["-s", folder / SIGNATURE]
    with (folder / SUMS).open("rb") as sums:
        done = subprocess.run(command, check=False, stdin=sums, capture_output=True, text=True)
    if done.returncode != 0:
        raise VerifyError(f"the signature of {SUMS} does not hold: {(done.stdout + done.stderr).strip()}")


def read_sums(sums: str) -> dict[str, str]:
    """The hex digests by name, of what `sha256sum` prints. Raises VerifyError."""
    digests = {}
    for line in sums.splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).name != name or name in digests:
            raise VerifyError(f"{SUMS} has a line that names no file of the folder: {line!r}")
        digests[name] = digest
    return digests


def _keys(signers: Path) -> Iterator[Ed25519PublicKey]:
    """Of the lines for SIGNER. Lines of other people and other kinds of key are passed over."""
    for line in signers.read_text().splitlines():
        principals, *words = line.split() or [""]
        if SIGNER not in principals.split(",") or "ssh-ed25519" not in words:
            continue
        at = words.index("ssh-ed25519")
        try:
            key = load_ssh_public_key(" ".join(words[at : at + 2]).encode())
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise VerifyError(f"{signers} has a key that cannot be read: {line!r}") from exc
        if isinstance(key, Ed25519PublicKey):
            yield key


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify what `make dist` made.")
    parser.add_argument("folder", type=Path, help="the folder with the wheels and SHA256SUMS")
    parser.add_argument("--signers", type=Path, required=True, help="the keys that you trust, as ssh-keygen's allowed_signers")
    given = parser.parse_args()
    try:
        verified = verify(given.folder, given.signers)
    except (VerifyError, AttestationError, OSError) as exc:
        raise SystemExit(f"not verified: {exc}") from exc
    for name, digest in sorted(verified.digests.items()):
        print(f"{digest}  {name}")
    parameters = verified.predicate["buildDefinition"]["externalParameters"]
    print(f"verified: built by {parameters['command']!r} from commit {parameters['commit']}")
    if parameters["uncommitted"] != "none":
        print(f"warning: with changes that were not committed: {parameters['uncommitted']}")


if __name__ == "__main__":
    main()
