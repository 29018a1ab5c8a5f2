"""`lacre worker digests`: what the manifest may say of the models that a worker's settings name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from lacre.errors import SettingsError
from lacre.trust.manifest import DIGEST, ModelEntry, ModelKind
from lacre_backend.engine.adapted import adapted_digest, adapted_name
from lacre_backend.engine.adapters import check
from lacre_backend.engine.embed import DEFAULT_CONTEXT
from lacre_backend.engine.gguf_header import Malformed, read
from lacre_backend.engine.model import DEFAULT_N_CTX
from lacre_backend.engine.projector import ProjectorFile, mtmd, projected_digest
from lacre_backend.engine.projector import check as check_projector
from lacre_backend.models.opening import open_model
from lacre_backend.settings import ModelSettings, WorkerSettings, with_default
from lacre_fabric.keys.kms import PLAIN
from lacre_fabric.settings import FilePath, KmsAddress, Table, validated

_RANK: Final = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK, as files say it
_POOLED: Final = {_RANK: ModelKind.RERANK}  # all other poolings embed
_HERMES: Final = "<tool_call>"  # begins a call in the form of Hermes and Qwen
_TEXT: Final = ("text",)  # what this engine reads without a projector
_WITH_IMAGES: Final = ("text", "image")


class PlannedModels(Table):
    """What `lacre up` is about to write into a worker's settings, as far as it concerns models."""

    kms: KmsAddress = PLAIN
    models: tuple[ModelSettings, ...]
    default_model: FilePath | None = None

    @classmethod
    def read(cls, file: BinaryIO, settings: Path) -> PlannedModels:
        """From JSON. settings: the file, for messages and relative paths; it need not exist. Raises SettingsError, also for
        what no worker here could load.
        """
        planned = validated(cls, json.loads(file.read()), settings)
        if any(model.projector is not None for model in planned.models):
            mtmd()
        return planned.model_copy(update={"models": with_default(planned.models, planned.default_model)})


def served_files(settings: WorkerSettings | PlannedModels) -> dict[str, ModelEntry]:
    """The entry of each model, and of each of its adapters. A signer is named if the settings demand one.

    Reads every file once. Raises what `open_model` raises, or SettingsError for an adapter that does not fit its model.
    """
    found: dict[str, ModelEntry] = {}
    for model in settings.models:
        conditions = replace(model.conditions(settings.kms), whole=True)
        base = open_model(model.path, model.name, conditions)
        described = description(base.file.path, model)
        projector = None if model.projector is None else open_model(model.projector, None, conditions)
        if projector is not None and model.projector is not None:
            file = ProjectorFile(projector.file.path, projector.file.digest, model.projector)
            check_projector(file, base.file.path)
            if described.kind is not ModelKind.GENERATE:
                raise SettingsError(f"{base.file.name} writes no text: remove its `projector`.")
        digest = projected_digest(base.file.digest, None if projector is None else projector.file.digest)
        signers = (base.signer, None if projector is None else projector.signer)
        found[base.file.name] = _entry(digest, *signers).described_as(described)
        for name, path in model.adapters.items():
            adapter = open_model(path, name, conditions)
            check(adapter.file.path, base.file.path, path)
            both = adapted_digest(digest, adapter.file.digest)
            found[adapted_name(base.file.name, name)] = _entry(both, *signers, adapter.signer).described_as(described)
    return found


def _entry(digest: str, *signers: str | None) -> ModelEntry:
    return ModelEntry((digest.removeprefix(DIGEST),), tuple(dict.fromkeys(each for each in signers if each is not None)))


def description(path: Path, settings: ModelSettings) -> ModelEntry:
    """What the model does, by its file's header and its settings. A worker with little memory may have a smaller context.

    Raises SettingsError.
    """
    try:
        header = read(path)
    except (Malformed, OSError) as exc:
        raise SettingsError(f"{path} cannot be read ({exc}): copy the file again") from exc
    architecture = header.text("general.architecture") or ""
    pooling = header.number(f"{architecture}.pooling_type")
    kind = _POOLED.get(pooling, ModelKind.EMBED) if pooling is not None else ModelKind.GENERATE
    usual = DEFAULT_N_CTX if kind is ModelKind.GENERATE else DEFAULT_CONTEXT
    context = settings.context or min(header.number(f"{architecture}.context_length") or usual, usual)
    if kind is not ModelKind.GENERATE:
        return ModelEntry(kind=kind, context=context, modalities=_TEXT)
    reads = _TEXT if settings.projector is None else _WITH_IMAGES
    calls = _calls(header.text("tokenizer.chat_template"))
    said = ModelEntry(kind=kind, context=context, max_output=settings.max_output, modalities=reads, tools=calls)
    return replace(said, max_output=said.output)


def _calls(template: str | None) -> str | None:
    """The format of calls, as far as the chat template's text tells. Models that know no tools learn Hermes' form of them."""
    if template is None:
        return None
    return "hermes" if _HERMES in template or "tools" not in template else None
