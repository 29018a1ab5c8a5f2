"""`lacre worker digests`: what the manifest may say of the model files that a worker's settings name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from lacre.trust.manifest import DIGEST, ModelEntry
from lacre_backend.engine.adapters import adapted_digest, adapted_name, check
from lacre_backend.models.opening import open_model
from lacre_backend.settings import ModelSettings, WorkerSettings, with_default
from lacre_fabric.keys.kms import PLAIN
from lacre_fabric.settings import FilePath, KmsAddress, Table, validated


class PlannedModels(Table):
    """What `lacre up` is about to write into a worker's settings, as far as it concerns models."""

    kms: KmsAddress = PLAIN
    models: tuple[ModelSettings, ...]
    default_model: FilePath | None = None

    @classmethod
    def read(cls, file: BinaryIO, settings: Path) -> PlannedModels:
        """From JSON. settings: the file, for messages and relative paths; it need not exist. Raises SettingsError."""
        planned = validated(cls, json.loads(file.read()), settings)
        return planned.model_copy(update={"models": with_default(planned.models, planned.default_model)})


def served_files(settings: WorkerSettings | PlannedModels) -> dict[str, ModelEntry]:
    """The entry of each model, and of each of its adapters. A signer is named if the settings demand one.

    Reads every file once. Raises what `open_model` raises, or SettingsError for an adapter that does not fit its model.
    """
    found: dict[str, ModelEntry] = {}
    for model in settings.models:
        conditions = replace(model.conditions(settings.kms), whole=True)
        base = open_model(model.path, model.name, conditions)
        found[base.file.name] = _entry(base.file.digest, base.signer)
        for name, path in model.adapters.items():
            adapter = open_model(path, name, conditions)
            check(adapter.file.path, base.file.path, path)
            both = adapted_digest(base.file.digest, adapter.file.digest)
            found[adapted_name(base.file.name, name)] = _entry(both, base.signer, adapter.signer)
    return found


def _entry(digest: str, *signers: str | None) -> ModelEntry:
    return ModelEntry((digest.removeprefix(DIGEST),), tuple(dict.fromkeys(each for each in signers if each is not None)))
