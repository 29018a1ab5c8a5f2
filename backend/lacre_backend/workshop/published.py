"""Whether a checkpoint is what its publisher published: by a signature of its folder, or by digests of Hugging Face.

Hugging Face names each file by a digest (its `ETag`): the SHA-256 of a large file, the object id of git for a small one. Its
programs keep it: beside a download (`.cache/huggingface/download/NAME.metadata`), or as the name that a link in the cache has.

Rules:
- A digest that is there is checked. What has none is named in the answer.
- The digests tell damage, no attack: who can change a file can change them. A signature tells both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lacre_backend.models import folders, signatures
from lacre_backend.models.checksum import DamagedModel
from lacre_backend.models.signatures import UntrustedModel
from lacre_backend.workshop.checkpoint import ModelFolder

_METADATA: Final = Path(".cache/huggingface/download")
_MAX_METADATA: Final = 4096  # bytes; a commit, a digest and a time take some 130
_ETAG: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_GIT: Final = 40  # digits of an object id, which is a SHA-1
_PIECE: Final = 2**20


@dataclass(frozen=True, slots=True)
class CheckedSource:
    """- signed: whether a signature covers every file. signer: whose, if the caller named keys.
    - published: how many files have the digest that Hugging Face gave them.
    - unchecked: weights and configuration that have neither.
    """  # fmt: skip

    signed: bool = False
    signer: str | None = None
    published: int = 0
    unchecked: list[str] = field(default_factory=list)


def check_source(source: ModelFolder, signers: Sequence[Path]) -> CheckedSource:
    """signers: public keys, one of which must have signed the folder.

    Raises UntrustedModel, DamagedModel, SettingsError, InvalidMessage or OSError.
    """
    signed, signer = _signed(source.folder, signers)
    found = set(_published(source.folder))
    read = [*source.weights, *sorted(source.folder.glob("*.json")), *sorted(source.folder.glob("*.model"))]
    unchecked = [] if signed else [path.name for path in read if path not in found]
    return CheckedSource(signed, signer, len(found), unchecked)


def _signed(folder: Path, signers: Sequence[Path]) -> tuple[bool, str | None]:
    path = signatures.signature_path(folder)
    if not path.is_file():
        if signers:
            raise UntrustedModel(f"{folder} has no signature: {path} does not exist")
        return False, None
    bundle = signatures.read_bundle(path)
    with signatures.naming(folder):
        digests = folders.read(folder, signatures.ignored_paths(bundle))
        if signers:
            return True, signatures.verify(digests, bundle, map(signatures.public_key, signers)).signer
        signatures.check_content(digests, bundle)
    return True, None


def _published(folder: Path) -> Iterator[Path]:
    """The files that are as Hugging Face has them. Raises DamagedModel for one that is not."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        place = folder / _METADATA / inside.with_name(f"{path.name}.metadata")
        if (etag := _etag(path, place)) is not None:
            if _digest(path, etag) != etag:
                kept = f" If you changed it on purpose, delete {place}." if place.is_file() else ""
                raise DamagedModel(f"{path} is not what Hugging Face published. Download it again.{kept}")
            yield path


def _etag(path: Path, place: Path) -> str | None:
    """None if it is not known. place: of its metadata."""
    said = ""
    if path.is_symlink() and path.is_file():
        target = path.resolve()
        said = target.name if target.parent.name == "blobs" else ""
    elif path.is_file() and place.is_file():
        with place.open("rb") as file:
            lines = file.read(_MAX_METADATA).decode("utf-8", "replace").splitlines()
        said = lines[1].strip() if len(lines) > 1 else ""
    return said if _ETAG.fullmatch(said) else None


def _digest(path: Path, etag: str) -> str:
    """Of the same kind as `etag`."""
    with path.open("rb") as file:
        if len(etag) != _GIT:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
