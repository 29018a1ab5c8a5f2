"""Seals a model file, and wraps a sealed model's key again: `lacre model seal` and `rewrap`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lacre.errors import SettingsError
from lacre_backend.engine.shards import check_file, files_of
from lacre_backend.models import sealed, signatures
from lacre_backend.models.chunked import sealed_size
from lacre_backend.models.gguf import ModelFile, find
from lacre_backend.models.sealed import About
from lacre_backend.models.signatures import UntrustedModel
from lacre_backend.workshop.child import Report
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.inspection import check_whole
from lacre_fabric.keys.kms import Kms, connect

_HEAD = 2**21  # bytes that the head takes at most, to check the free space


def seal_model(source: Path, out: Path, kms: str, report: Report, signers: Sequence[Path] = ()) -> About:
    """Writes `out`. A signature beside the model goes into the sealed file, if it is of this content.

    signers: public keys, one of which must have signed the model; empty: any key, or none. Raises SettingsError,
    UntrustedModel, KmsError or OSError.
    """
    check_file(source)
    if sealed.is_sealed(source):
        raise SettingsError(f"{source} is sealed already. To change who can open it, use `lacre model rewrap`.")
    if len(files_of(source)) > 1:
        raise SettingsError(
            f"{source} is split into several files, and llama.cpp opens a sealed model as one file. Merge them first with "
            f"`lacre model quantize {source} --type COPY --out OUT`, then sign and seal OUT."
        )
    with connected(kms) as service:
        report("digest", 0.0)
        file = find(source)
        check_whole(source)
        size = source.stat().st_size
        about = About(file.name, file.digest, size, _signature(file, signers))
        with draft(out, [source], size=sealed_size(size) + _HEAD) as path, path.open("xb") as written:
            for done in sealed.seal(source, written, about, service):
                report("sealing", 0.3 + 0.7 * done / max(size, 1))
    return about


def _signature(file: ModelFile, signers: Sequence[Path]) -> bytes:
    """The bundle beside the model; empty if there is none. Raises UntrustedModel, InvalidMessage, SettingsError or OSError."""
    path = signatures.signature_path(file.path)
    if not path.is_file():
        if signers:
            raise UntrustedModel(f"{file.path} has no signature: {path} does not exist")
        return b""
    bundle = signatures.read_bundle(path)
    with signatures.naming(file.path):
        if signers:
            signatures.verify(file.digests, bundle, map(signatures.public_key, signers))
        else:
            signatures.check_content(file.digests, bundle)
    return bundle


def rewrap_model(path: Path, old: str, new: str) -> About:
    """Replaces the file. Raises as `seal_model`, and SealedModelInvalid."""
    check_file(path)
    about = sealed.read_head(path).about
    size = path.stat().st_size
    with connected(old) as before, connected(new) as after, draft(path, [], size=size) as out, out.open("xb") as written:
        sealed.rewrap(path, written, before, after)
    return about


@contextmanager
def connected(address: str) -> Iterator[Kms]:
    """The service at `address`. Raises SettingsError."""
    service = connect(address)
    if service is None:
        raise SettingsError("`plain:` wraps nothing: give the address of a key management service, see docs/kms.md.")
    try:
        yield service
    finally:
        service.close()
