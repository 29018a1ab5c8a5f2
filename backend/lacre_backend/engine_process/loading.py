"""Loads a model as its settings say, in this process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from lacre.errors import SettingsError
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.draft_model import DraftFile
from lacre_backend.engine.embed import LlamaEmbedder, LlamaReranker
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, ModelMetadata
from lacre_backend.engine.projector import ProjectorFile, projected_digest
from lacre_backend.engine.protocol import TaskKind
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models.opening import Conditions, open_model
from lacre_backend.settings import ModelSettings
from lacre_fabric.keys.kms import PLAIN, Kms


def load_engine(model: ModelSettings, kms: str = PLAIN, *, service: Kms | None = None) -> LlamaEngine | LlamaEmbedder:
    """The engine for a model's file. kms: the address of the service that opens sealed models. service: used in its place.

    Raises SettingsError if the file is missing, not GGUF or too large, or if its tokenizer fails its trial; or what
    `open_model` raises.
    """
    conditions = replace(model.conditions(kms), service=service)
    opened = open_model(model.path, model.name, conditions)
    adapters, draft = open_adapters(model, conditions), open_draft(model, conditions)
    projector = open_projector(model, conditions)
    file = opened.file
    tokenizer = Tokenizer(file.path)  # before anything here reads the vocabulary
    try:
        facts = ModelMetadata.read(file.path)
        reads = LlamaReranker if facts.ranks else LlamaEmbedder
        embeds = facts.kind is TaskKind.EMBED
        if embeds and adapters:
            raise SettingsError(f"{file.name} embeds, and adapters are for models that generate: remove `adapters`.")
        if embeds and projector is not None:
            raise SettingsError(f"{file.name} embeds, and projectors are for models that generate: remove `projector`.")
        engine = reads if embeds else partial(LlamaEngine, adapters=adapters, draft=draft, projector=projector)
        return engine(
            file.path,
            name=file.name,
            digest=projected_digest(file.digest, None if projector is None else projector.digest),
            settings=options(model),
            tokenizer=tokenizer,
            weights=opened.weights,
        )
    except BaseException:
        tokenizer.close()
        raise


def open_adapters(model: ModelSettings, conditions: Conditions) -> list[AdapterFile]:
    """The adapters of a model's table. They must meet what the model must. Raises as `open_model`."""
    opened = [(name, path, open_model(path, name, conditions)) for name, path in model.adapters.items()]
    return [AdapterFile(name, one.file.path, one.file.digest, one.weights, path) for name, path, one in opened]


def open_draft(model: ModelSettings, conditions: Conditions) -> DraftFile | None:
    """The draft model, if one is used. It must meet what the model must. Raises as `open_model`."""
    if model.draft_model is None or model.speculation != "draft":
        return None
    opened = open_model(model.draft_model, None, conditions)
    return DraftFile(opened.file.path, model.draft_model.name, opened.weights)


def open_projector(model: ModelSettings, conditions: Conditions) -> ProjectorFile | None:
    """The projector, if the model has one. It must meet what the model must. Raises as `open_model`."""
    if model.projector is None:
        return None
    opened = open_model(model.projector, None, conditions)
    return ProjectorFile(opened.file.path, opened.file.digest, model.projector, opened.weights)


def options(model: ModelSettings) -> LlamaSettings:
    """A model's table as the engine's settings."""
    return LlamaSettings(
        n_ctx=model.context,
        threads=model.threads,
        slots=model.slots,
        unified=model.unified,
        cells=model.cells,
        flash=model.flash,
        kv_type=model.kv_type,
        n_batch=model.n_batch,
        n_ubatch=model.n_ubatch,
        chunk=model.chunk,
        burst=model.burst,
        prefill=model.prefill,
        beyond_training=model.beyond_training,
        idle_caches=model.idle_caches,
        speculation=model.speculation,
        gpu=Gpu(model.gpu_layers, model.split_mode, model.main_gpu, model.tensor_split),
    )
