"""Opens a model for serving: finds its file, unseals it, verifies its signature, as the worker's settings demand.

Rules: nothing is loaded before its signature is verified. What the settings demand and the file lacks is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lacre.errors import SettingsError
from lacre_backend.models import signatures
from lacre_backend.models.chunked import SealedModelInvalid
from lacre_backend.models.gguf import WHOLE, FileDigests, ModelFile, default_path, find
from lacre_backend.models.sealed import SealedWeights, is_sealed
from lacre_backend.models.signatures import UntrustedModel
from lacre_fabric.keys.kms import PLAIN, Kms, WrongWrapping, connect
from lacre_fabric.work.model_names import from_file


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a model must meet. kms: the address of the KMS that opens sealed models. sealed: refuse plain files.

    signers: public keys in PEM; if there are any, one of them must have signed the model. whole: open a sealed model to its
    end before it is used; a worker does that anyway when it loads the weights. service: the KMS itself, already connected; its
    owner closes it.
    """

    kms: str = PLAIN
    sealed: bool = False
    signers: Sequence[Path] = ()
    whole: bool = False
    service: Kms | None = None


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """weights: of a sealed model; None: `file.path` has them. signer: the id of the key whose signature was verified."""

    file: ModelFile
    weights: SealedWeights | None = None
    signer: str | None = None

    def bundle(self) -> bytes:
        """Its signature, unverified; empty if it has none. Raises InvalidMessage, or OSError."""
        if self.weights is not None:
            return self.weights.about.signature
        path = signatures.signature_path(self.file.path)
        return signatures.read_bundle(path) if path.is_file() else b""


def open_model(path: Path | None, name: str | None, conditions: Conditions) -> OpenedModel:
    """Reads a plain model once for its digest. Raises SettingsError, UntrustedModel, SealedModelInvalid or KmsError."""
    if path is None or not path.is_file() or not is_sealed(path):
        if conditions.sealed:
            raise SettingsError(
                f"{path or default_path()} is not sealed, and `sealed = true` allows no plain model. "
                "Seal it with `lacre model seal`, or correct the path."
            )
        plain = find(path, name)
        return _verified(plain.path, OpenedModel(plain), conditions)
    weights = _unsealed(path, conditions)
    hexadecimal = weights.about.digest.removeprefix("sha256:")
    file = ModelFile(weights.head, from_file(path) if name is None else name, FileDigests({WHOLE: hexadecimal}, hexadecimal))
    return _verified(path, OpenedModel(file, weights), conditions)


def _unsealed(path: Path, conditions: Conditions) -> SealedWeights:
    service = conditions.service or connect(conditions.kms)
    if service is None:
        raise SettingsError(
            f"{path} is sealed. Give the address of the service that wrapped its key: with --kms, or as `kms` in worker.toml."
        )
    try:
        weights = SealedWeights(path, service)
        if conditions.whole:
            weights.check()
    except (SealedModelInvalid, WrongWrapping) as exc:
        what = str(exc).removesuffix(f". {exc.remedy}")  # WrongWrapping adds its remedy itself
        raise exc if str(path) in what else type(exc)(f"{path}: {what}") from None
    finally:
        if conditions.service is None:
            service.close()
    return weights


def _verified(path: Path, opened: OpenedModel, conditions: Conditions) -> OpenedModel:
    if not conditions.signers:
        return opened
    if not (bundle := opened.bundle()):
        raise UntrustedModel(f"{path}: the model {opened.file.name} has no signature, and its settings demand one")
    keys = [signatures.public_key(key) for key in conditions.signers]
    with signatures.naming(path):
        return replace(opened, signer=signatures.verify(opened.file.digests, bundle, keys).signer)
